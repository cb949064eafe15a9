"""Documents to global batches that one cursor addresses. Imports config and storage only.

What is named here is imported when it is asked for: preparing a corpus, in a process for each core, does without torch,
which takes seconds and hundreds of megabytes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from areal_ray.data.batches import GlobalBatches
    from areal_ray.data.dataset import IGNORED, TokenDataset, next_tokens
    from areal_ray.data.packing import PackedTokens
    from areal_ray.data.splits import load_splits
    from areal_ray.data.tokenizers import build_tokenizer

__all__ = ["IGNORED", "GlobalBatches", "PackedTokens", "TokenDataset", "build_tokenizer", "load_splits", "next_tokens"]

_MODULES = {
    "GlobalBatches": "batches",
    **dict.fromkeys(("IGNORED", "TokenDataset", "next_tokens"), "dataset"),
    "PackedTokens": "packing",
    "load_splits": "splits",
    "build_tokenizer": "tokenizers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES.values():
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
