"""Rows of a configuration."""

from __future__ import annotations

from areal_ray.config import DataConfig
from areal_ray.data.corpus.corpus import TokenStream
from areal_ray.data.dataset import TokenDataset
from areal_ray.data.packing.concatenate import ConcatenatedRows
from areal_ray.data.packing.masked import MaskedRows
from areal_ray.data.packing.pairs import PairRows
from areal_ray.data.packing.whole import Truncation, WholeRows, best_fit, one_a_row


def build_rows(config: DataConfig, stream: TokenStream, seq_len: int, old_dtype: str) -> TokenDataset:
    """The rows of a stream.

    Args:
        config: of the data of one source.
        stream: its tokens.
        seq_len: tokens per row.
        old_dtype: of tokens in fingerprints that were made before corpora were prepared.
    """
    if config.packing == "concatenate":
        return MaskedRows(stream, seq_len) if config.document_mask else ConcatenatedRows(stream, seq_len, old_dtype)
    if config.format == "preference":
        assert config.truncation != "split"
        return PairRows(stream, seq_len, config.truncation or "error")
    usual: Truncation = "split" if config.format == "text" else "error"
    arrange = best_fit if config.packing == "best_fit" else one_a_row
    return WholeRows(stream, seq_len, arrange, config.truncation or usual, config.document_mask)
