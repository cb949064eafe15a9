"""Packing: tokens to rows of equal length, addressed by number."""

from areal_ray.data.packing.build import build_rows
from areal_ray.data.packing.concatenate import ConcatenatedRows, PackedTokens

__all__ = ["ConcatenatedRows", "PackedTokens", "build_rows"]
