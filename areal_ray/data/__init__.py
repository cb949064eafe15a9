"""Documents to global batches that one cursor addresses. Imports config and storage only."""

from areal_ray.data.batches import GlobalBatches
from areal_ray.data.dataset import IGNORED, TokenDataset, next_tokens
from areal_ray.data.packing import PackedTokens
from areal_ray.data.splits import load_splits
from areal_ray.data.tokenizers import build_tokenizer

__all__ = ["IGNORED", "GlobalBatches", "PackedTokens", "TokenDataset", "build_tokenizer", "load_splits", "next_tokens"]
