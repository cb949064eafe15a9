"""Tokenizers: bytes to token ids."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import xxhash

from areal_ray.config import ConfigError

# Words, numbers, spaces, line ends, scripts and a character of four bytes: what tokenizers treat differently.
_PROBE = "The 1st naïve\tfunction  f(x) -> 3.14;\r\n\n  returns 'größer' или 日本語 🙂".encode()


class Tokenizer(Protocol):
    """Attributes:
    vocab_size: rows that a model needs: the largest id and one more, which may be more than there are tokens.
    bos_id, eos_id: beginning and end of a text; None if it has no such token.
    adds_bos: whether its own encoding begins with the former.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    @property
    def fingerprint(self) -> str:
        """A hash of what it makes of text: of its tokens with their ids, and of a probe."""
        ...

    def ids(self, text: bytes) -> np.ndarray:
        """Token ids (1-D, integers) of a text and nothing else."""
        ...

    def encode(self, document: bytes) -> np.ndarray:
        """Token ids (1-D, integers) of one document, its beginning marked if that is its way, and its end."""
        ...

    def save(self, folder: str) -> None:
        """Write it as files that transformers' AutoTokenizer reads."""
        ...

    def transformers(self) -> Any:
        """The same as a tokenizer of transformers."""
        ...


class ByteTokenizer:
    """The 256 bytes and one token, 256, for the end of a document. Needs no vocabulary file."""

    vocab_size = 257
    bos_id: int | None = None
    eos_id: int | None = 256
    adds_bos = False
    fingerprint = "bytes"

    def ids(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def encode(self, document: bytes) -> np.ndarray:
        return np.append(self.ids(document), np.uint16(256))

    def save(self, folder: str) -> None:
        self.transformers().save_pretrained(folder)

    def transformers(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        # Byte-level BPE without merges: each byte stands as one printable character, GPT-2's table of them.
        vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


class HuggingFaceTokenizer:
    """A transformers tokenizer from a directory or hub name.

    Raises:
        ConfigError: if it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            text = f"cannot load {path!r}: {' '.join(str(error).split())[:200]}; `bytes` needs no files"
            raise ConfigError("data.tokenizer", text) from None
        self._path = path
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and self._tokenizer("a")["input_ids"][:1] == [self.bos_id]
        # Its length counts tokens, and says nothing of their ids.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())

    @cached_property
    def fingerprint(self) -> str:
        # Not of its files: they may be written anew by another version and mean the same.
        known = sorted(self._tokenizer.get_vocab().items())
        about = (known, self.bos_id, self.eos_id, self.adds_bos, self.ids(_PROBE).tolist())
        return xxhash.xxh3_128(repr(about).encode("utf-8", "surrogatepass")).hexdigest()

    def ids(self, text: bytes) -> np.ndarray:
        decoded = text.decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"], np.uint32)

    def encode(self, document: bytes) -> np.ndarray:
        if self.eos_id is None:
            raise ConfigError("data.tokenizer", f"{self._path!r} has no end-of-text token")
        begin = [self.bos_id] if self.adds_bos else []
        return np.concatenate([np.asarray(begin, np.uint32), self.ids(document), np.asarray([self.eos_id], np.uint32)])

    def save(self, folder: str) -> None:
        self._tokenizer.save_pretrained(folder)

    def transformers(self) -> Any:
        return self._tokenizer


def build_tokenizer(name: str | None) -> Tokenizer:
    """`bytes` (or None), or the path of a Hugging Face tokenizer."""
    return ByteTokenizer() if name is None or name == "bytes" else HuggingFaceTokenizer(name)


def check_of_model(name: str | None, tokenizer: Tokenizer, model_path: str) -> None:
    """Raise ConfigError if a pretrained model has a tokenizer of its own that is another one than this.

    Args:
        name: of the tokenizer.
        tokenizer: that is to be used.
        model_path: a Hugging Face directory or hub name.
    """
    if name == model_path or (os.path.exists(model_path) and not _has_tokenizer(model_path)):
        return
    own = build_tokenizer(model_path)
    alike = own.vocab_size == tokenizer.vocab_size and own.eos_id == tokenizer.eos_id
    if not (alike and np.array_equal(own.ids(_PROBE), tokenizer.ids(_PROBE))):
        raise ConfigError(
            "data.tokenizer",
            f"{name} is not the tokenizer of {model_path}, whose weights know other tokens: leave data.tokenizer out, "
            "or say data.allow_other_tokenizer=true",
        )


def _has_tokenizer(folder: str) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
    return any(os.path.exists(os.path.join(folder, name)) for name in names)
