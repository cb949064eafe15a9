"""Adapters: a few trained parameters in a model whose own ones, the base, are frozen. Imports config."""

from areal_ray.models.adapters.adapter import Adapted, Adapter, attach
from areal_ray.models.adapters.build import build_adapted, build_adapter
from areal_ray.models.adapters.fingerprint import Fingerprint, quick_fingerprint

__all__ = ["Adapted", "Adapter", "Fingerprint", "attach", "build_adapted", "build_adapter", "quick_fingerprint"]
