"""Bytes of text that each token stands for: with them losses of different tokenizers can be compared."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from areal_ray.data.tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of each token id, (vocab_size) of int32; special tokens, which are no text, have none.

    Exact for tokenizers of bytes (byte-level BPE: the sum over a text's tokens is its length in UTF-8), and for those
    of SentencePiece but for the space that some of them put before a text. Of others it is what a token is decoded to
    by itself.
    """
    found = np.zeros(tokenizer.vocab_size, np.int32)
    if tokenizer.fingerprint == "bytes":
        found[:256] = 1
        return found
    plain: Any = tokenizer.transformers()
    added = plain.added_tokens_decoder
    kinds = _decoders(plain)
    for token, number in plain.get_vocab().items():
        if number in added:
            found[number] = 0 if added[number].special else len(added[number].content.encode(errors="replace"))
        elif "ByteLevel" in kinds:
            found[number] = len(token)  # a printable character stands for each byte
        elif kinds & {"ByteFallback", "Metaspace"}:
            found[number] = 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode(errors="replace"))
        else:
            found[number] = len(plain.decode([number]).encode(errors="replace"))
    return found


def _decoders(tokenizer: Any) -> set[str]:
    """Kinds of the steps that make text of tokens; none for a tokenizer that is not made of such."""
    if not tokenizer.is_fast:
        return set()
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    steps = decoder.get("decoders") or [decoder]
    return {step.get("type", "") for step in steps}
