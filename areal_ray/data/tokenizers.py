"""Tokenizers: bytes to token ids."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from areal_ray.config import ConfigError


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, document: bytes) -> np.ndarray:
        """Token ids (1-D, integers) of one document, its end marked."""
        ...

    def save(self, folder: str) -> None:
        """Write it as files that transformers' AutoTokenizer reads."""
        ...


class ByteTokenizer:
    """The 256 bytes and one token, 256, for the end of a document. Needs no vocabulary file."""

    vocab_size = 257

    def encode(self, document: bytes) -> np.ndarray:
        return np.append(np.frombuffer(document, dtype=np.uint8).astype(np.uint16), np.uint16(256))

    def save(self, folder: str) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        # Byte-level BPE without merges: each byte stands as one printable character, GPT-2's table of them.
        vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


class HuggingFaceTokenizer:
    """A transformers tokenizer from a directory or hub name.

    Raises:
        ConfigError: if it cannot be loaded or has no end-of-text token.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError("data.tokenizer", f"cannot load {path!r}: {' '.join(str(error).split())[:200]}") from None
        if self._tokenizer.eos_token_id is None:
            raise ConfigError("data.tokenizer", f"{path!r} has no end-of-text token")
        self.vocab_size = len(self._tokenizer)

    def encode(self, document: bytes) -> np.ndarray:
        ids = self._tokenizer(document.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        return np.asarray([*ids, self._tokenizer.eos_token_id], dtype=np.uint32)

    def save(self, folder: str) -> None:
        self._tokenizer.save_pretrained(folder)


def build_tokenizer(name: str | None) -> Tokenizer:
    """`bytes` (or None), or the path of a Hugging Face tokenizer."""
    return ByteTokenizer() if name is None or name == "bytes" else HuggingFaceTokenizer(name)
