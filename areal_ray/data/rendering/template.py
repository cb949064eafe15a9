"""A chat template: conversations to text, and to tokens of which the assistant's are marked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.records import Tokens
from areal_ray.data.tokenizers import Tokenizer

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "assistant"
# Llama's templates have the date of today, with which a corpus would be another one tomorrow; this is their default.
_SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class NotRendered(Exception):
    """Why a conversation cannot be rendered."""


class ChatTemplate:
    """The template that a tokenizer comes with, or one that is given.

    Args:
        config: of the data.
        tokenizer: of config.tokenizer.

    Raises:
        ConfigError: if there is none, or its tokenizer does not say which text a token is of.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer.transformers()
        given = config.chat_template
        if given is not None and "{" not in given:  # a file
            try:
                given = Path(os.path.expanduser(given)).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError("data.chat_template", f"cannot read {given}: {error}") from None
        if given is not None:
            self._tokenizer.chat_template = given
        if not self._tokenizer.chat_template:
            text = f"the tokenizer {config.tokenizer or 'bytes'} has none: name a file with one"
            raise ConfigError("data.chat_template", text)
        if not self._tokenizer.is_fast:
            text = "messages need one that knows the places of its tokens in the text (a tokenizer.json)"
            raise ConfigError("data.tokenizer", text)
        self._special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        template = self._template(None)
        self.marks_answers = _MARK.search(template) is not None
        self.fingerprint = f"{tokenizer.fingerprint} {xxhash.xxh3_128_hexdigest(template.encode())}"

    @property
    def text(self) -> str:
        """The template as it was given, or as the tokenizer came with it."""
        text: str = self._tokenizer.get_chat_template()
        return text

    @property
    def special_ids(self) -> set[int]:
        """Ids of the tokenizer's special tokens."""
        return {number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    def prompt(self, text: str) -> list[int]:
        """Token ids of what a user says, up to where the answer begins (NotRendered)."""
        messages = [{"role": "user", "content": text}]
        rendered = self._apply(messages, None, tokenize=False, add_generation_prompt=True)
        return [int(each) for each in self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]]

    def tokens(self, messages: list[Any], tools: list[Any] | None, answers: Sequence[int] | None = None) -> Tokens:
        """A conversation, of which what the assistant says is predicted, with the token that ends it.

        A template that marks it ({% generation %}) says so itself. Else it is what comes after the text of the turns
        before, with the beginning of an answer, which must be a beginning of the text of all turns.

        Args:
            messages: with role and content, and whatever else the template reads.
            tools: as the template has them; None: none.
            answers: the numbers of the messages that are predicted; None: all of the assistant's.

        Raises:
            NotRendered: if the template refuses it, or does not say where an answer begins.
        """
        self._check(messages)
        if self.marks_answers and answers is None:
            made = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            predicted = np.asarray(made["assistant_masks"], bool)
        else:
            chosen = [i for i, each in enumerate(messages) if each["role"] == _ANSWER] if answers is None else answers
            text = self._apply(messages, tools, tokenize=False)
            spans = [self._span(messages, tools, number, text) for number in chosen]
            made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            places = np.asarray(made["offset_mapping"], np.int64).reshape(-1, 2)
            predicted = np.zeros(len(places), bool)
            for begin, end in spans:
                predicted |= (places[:, 1] > begin) & (places[:, 0] < end)
        if not predicted.any():
            raise NotRendered("the assistant says nothing in it that could be predicted")
        return Tokens(np.asarray(made["input_ids"], np.uint32), predicted)

    def _span(self, messages: list[Any], tools: list[Any] | None, number: int, text: str) -> tuple[int, int]:
        """First character, and the one after the last, of an answer in the text of all messages."""
        before = self._apply(messages[:number], tools, tokenize=False, add_generation_prompt=True) if number else ""
        through = self._apply(messages[: number + 1], tools, tokenize=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise NotRendered(
                f"the chat template renders turn {number + 1} in another way when others follow, or after it has begun "
                "the answer, so that it does not say what is predicted; give data.chat_template with "
                "{% generation %} ... {% endgeneration %} around it"
            )
        answer = through[len(before) :]
        # What comes after the token that ends an answer is for nobody to say.
        ends = [answer.rfind(token) + len(token) for token in self._special if token in answer]
        end = max(ends, default=0)
        return len(before), len(before) + (end if end and not answer[end:].strip() else len(answer))

    def _apply(self, messages: list[Any], tools: list[Any] | None, **options: Any) -> Any:
        try:
            template = self._template(tools)
            return self._tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **options)
        except Exception as error:  # noqa: BLE001  (a template is a program, and raises what it likes)
            text = " ".join(str(error).split())[:300]
            raise NotRendered(f"the chat template refuses it: {type(error).__name__}: {text}") from None

    def _template(self, tools: list[Any] | None) -> str:
        template: str = self._tokenizer.get_chat_template(tools=tools)
        return _SAME_DAY + template if "strftime_now" in template else template

    @staticmethod
    def _check(messages: Any) -> None:
        if not isinstance(messages, list) or not messages:
            raise NotRendered("messages must be a list of them, with one at least")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise NotRendered(f"message {number} must have a role and its content")
