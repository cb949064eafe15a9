"""Bytes to token ids."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from areal_ray.config import ConfigError


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, document: bytes) -> np.ndarray:
        """Token ids (1-D, integers) of one document, its end marked."""
        ...


class ByteTokenizer:
    """The 256 bytes and one token, 256, for the end of a document. Needs no vocabulary file."""

    vocab_size = 257

    def encode(self, document: bytes) -> np.ndarray:
        return np.append(np.frombuffer(document, dtype=np.uint8).astype(np.uint16), np.uint16(256))


class HuggingFaceTokenizer:
    """A transformers tokenizer from a directory or hub name.

    Raises:
        ConfigError: if it cannot be loaded or has no end-of-text token.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ConfigError("data.tokenizer", f"cannot load {path!r}: {' '.join(str(error).split())[:200]}") from None
        if self._tokenizer.eos_token_id is None:
            raise ConfigError("data.tokenizer", f"{path!r} has no end-of-text token")
        self.vocab_size = len(self._tokenizer)

    def encode(self, document: bytes) -> np.ndarray:
        ids = self._tokenizer(document.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        return np.asarray([*ids, self._tokenizer.eos_token_id], dtype=np.uint32)


def build_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a Hugging Face tokenizer."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
