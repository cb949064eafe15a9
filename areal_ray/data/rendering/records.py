"""Records to tokens: conversations, prompts with a completion, prompts with a chosen and a rejected answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.records import Document, Tokens
from areal_ray.data.rendering.template import ChatTemplate, NotRendered
from areal_ray.data.rendering.text import Marks
from areal_ray.data.tokenizers import Tokenizer


class RecordRenderer(ABC):
    """A Renderer of records; what it cannot render is an error, or left out and counted with data.on_error=skip.

    Args:
        config: of the data.
        tokenizer: of config.tokenizer.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._fails = config.on_error == "fail"
        self.skipped: Counter[str] = Counter()

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    def __call__(self, document: Document) -> Iterator[Tokens]:
        assert isinstance(document.content, dict)
        try:
            yield from self._render(document.content)  # all or nothing
        except NotRendered as error:
            if self._fails:
                hint = "data.on_error=skip leaves such records out"
                raise ConfigError("data.format", f"{document.origin}: {error}; {hint}") from None
            self.skipped["records that cannot be rendered left out"] += 1

    @abstractmethod
    def _render(self, record: dict[str, Any]) -> list[Tokens]:
        """The tokens of a record (NotRendered)."""


class Messages(RecordRenderer):
    """Conversations: `messages`, and perhaps `tools`, which may be their JSON as well."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._template = ChatTemplate(config, tokenizer)

    @property
    def fingerprint(self) -> str:
        return f"messages {self._template.fingerprint}"

    def _render(self, record: dict[str, Any]) -> list[Tokens]:
        return [self._template.tokens(record["messages"], _tools(record.get("tools")))]


class Answers:
    """A prompt with an answer, of which the answer is predicted.

    Both are text, tokenized one by one as a model meets them, or lists of messages, rendered by the chat template.

    Args:
        config: of the data.
        tokenizer: of config.tokenizer.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._marks = tokenizer, Marks(config, tokenizer)
        has_template = config.chat_template is not None or bool(tokenizer.transformers().chat_template)
        self._template = ChatTemplate(config, tokenizer) if has_template else None

    @property
    def fingerprint(self) -> str:
        marks = self._marks.begin.tolist(), self._marks.end.tolist()
        return f"{self._tokenizer.fingerprint} {marks} {self._template.fingerprint if self._template else None}"

    def tokens(self, prompt: Any, answer: Any) -> Tokens:
        """Raises NotRendered."""
        if isinstance(prompt, str) and isinstance(answer, str):
            said, answered = (self._tokenizer.ids(text.encode(errors="replace")) for text in (prompt, answer))
            ids = np.concatenate([self._marks.begin, said, answered, self._marks.end])
            first = len(self._marks.begin) + len(said)
            if first == len(ids):
                raise NotRendered("an empty answer")
            return Tokens(ids.astype(np.uint32), np.arange(len(ids)) >= first)
        if not (isinstance(prompt, list) and isinstance(answer, list)):
            raise NotRendered("prompt and answer must both be text, or both lists of messages")
        if self._template is None:
            raise NotRendered("messages need a chat template, which the tokenizer does not have: data.chat_template")
        answers = [
            len(prompt) + i
            for i, each in enumerate(answer)
            if isinstance(each, dict) and each.get("role") == "assistant"
        ]
        return self._template.tokens(prompt + answer, None, answers)


class Completion(RecordRenderer):
    """Records of `prompt` and `completion`."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._answers = Answers(config, tokenizer)

    @property
    def fingerprint(self) -> str:
        return f"completion {self._answers.fingerprint}"

    def _render(self, record: dict[str, Any]) -> list[Tokens]:
        return [self._answers.tokens(record["prompt"], record["completion"])]


class Preference(RecordRenderer):
    """Records of `prompt`, `chosen` and `rejected`: a pair of sequences, in this order."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._answers = Answers(config, tokenizer)

    @property
    def fingerprint(self) -> str:
        return f"preference {self._answers.fingerprint}"

    def _render(self, record: dict[str, Any]) -> list[Tokens]:
        return [
            replace(self._answers.tokens(record["prompt"], record[name]), group=name) for name in ("chosen", "rejected")
        ]


def _tools(tools: Any) -> Any:
    if not isinstance(tools, str):
        return tools or None
    try:
        return json.loads(tools)
    except ValueError as error:
        raise NotRendered(f"tools are no JSON: {error}") from None
