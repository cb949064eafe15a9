"""Text to tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.records import Document, Tokens
from areal_ray.data.tokenizers import Tokenizer

# So much of a document is tokenized at once; a longer one is cut at ends of lines first, which some tokenizers would
# have reached across. Without that memory would be many times the longest document.
_PIECE = 64 << 20


class Marks:
    """The tokens that begin and end a text.

    Args:
        config: whether they are wanted; by default as the tokenizer's own encoding does it, and the end always.
        tokenizer: that has them.

    Raises:
        ConfigError: if they are wanted, and it has none.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        if config.add_bos and tokenizer.bos_id is None:
            raise ConfigError("data.add_bos", f"{config.tokenizer or 'bytes'} has no beginning-of-text token")
        if config.add_eos is not False and tokenizer.eos_id is None:
            text = f"{config.tokenizer!r} has no end-of-text token; data.add_eos=false goes without"
            raise ConfigError("data.tokenizer", text)
        begins = tokenizer.adds_bos if config.add_bos is None else config.add_bos
        self.begin = _array(tokenizer.bos_id if begins else None)
        self.end = _array(None if config.add_eos is False else tokenizer.eos_id)


class TextRenderer:
    """A Renderer of text, and of records of tokens (`input_ids`), which are taken as they are.

    Args:
        config: of the data.
        tokenizer: of config.tokenizer.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._marks = tokenizer, Marks(config, tokenizer)
        self.skipped: Counter[str] = Counter()

    @property
    def fingerprint(self) -> str:
        marks = self._marks
        return f"text {self._tokenizer.fingerprint} {marks.begin.tolist()} {marks.end.tolist()}"

    def __call__(self, document: Document) -> Iterator[Tokens]:
        if isinstance(document.content, dict):
            yield self._given(document.content["input_ids"], document.origin)
            return
        yield from self._pieces(document.content)

    def _given(self, ids: list[int], origin: str) -> Tokens:
        tokens = np.asarray(ids, np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._tokenizer.vocab_size:
            text = f"input_ids from {tokens.min()} to {tokens.max()}, and data.tokenizer has those below"
            raise ConfigError("data.tokenizer", f"{origin}: {text} {self._tokenizer.vocab_size}")
        return Tokens(tokens.astype(np.uint32))

    def _pieces(self, content: bytes) -> Iterator[Tokens]:
        begin, end = self._marks.begin, self._marks.end
        if len(content) <= _PIECE:
            yield Tokens(np.concatenate([begin, self._tokenizer.ids(content), end]))
            return
        if len(begin):
            yield Tokens(begin)
        at = 0
        while at < len(content):
            to = at + _PIECE
            if to < len(content):
                cut = content.rfind(b"\n", at, to) + 1 or content.rfind(b" ", at, to)
                # A line without a space is cut anywhere, but not in the middle of a character.
                to = cut if cut > at else to - next((n for n in range(4) if content[to - n] & 0xC0 != 0x80), 0)
            yield Tokens(self._tokenizer.ids(content[at:to]))
            at = to
        if len(end):
            yield Tokens(end)


def _array(token: int | None) -> np.ndarray:
    return np.asarray([] if token is None else [token], np.uint32)
