"""The special tokens that a model is trained with: what its users need to prompt it, and to know when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.rendering.template import ChatTemplate, NotRendered
from areal_ray.data.rendering.text import Marks
from areal_ray.data.tokenizers import Tokenizer

_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def trained_tokens(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens of the rows that are trained on, as plain values for a manifest.

    Args:
        config: of the data, of all of its sources.
        tokenizer: of config.tokenizer.

    Returns:
        begins: whether a text begins with the tokenizer's beginning-of-text token. ends: ids that end a text or a turn
        of a chat, the one of a turn first. chat_template: the text of it, if chats are trained on.

    Raises:
        ConfigError: if the tokenizer lacks what the data need.
    """
    formats = {each.format for each in config.sources.values()}
    ends: list[int] = []
    template = None
    for each in config.sources.values():
        if each.format == "messages":
            chat = ChatTemplate(each, tokenizer)
            template = chat.text
            ends += [] if (end := _end_of_turn(chat)) is None else [end]
    begins = tokenizer.adds_bos
    if formats != {"messages"} and tokenizer.eos_id is not None:
        marks = Marks(config, tokenizer)
        begins = bool(len(marks.begin))
        ends += [int(token) for token in marks.end]
    return {"begins": begins, "ends": list(dict.fromkeys(ends)), "chat_template": template}


def prompt_ids(config: DataConfig, tokenizer: Tokenizer, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids of prompts, beginning as the rows that are trained on do.

    Args:
        config: of the data, of all of its sources.
        tokenizer: of config.tokenizer.
        prompts: texts.
        chat: what a user says, in the chat template of the data.

    Raises:
        ConfigError: if there is no chat template, or it refuses one of them.
    """
    if chat:
        sources = config.sources.values()
        template = ChatTemplate(next((each for each in sources if each.format == "messages"), config), tokenizer)
        try:
            return [template.prompt(text) for text in prompts]
        except NotRendered as error:
            raise ConfigError("eval.generate.prompts", str(error)) from None
    begins = trained_tokens(config, tokenizer)["begins"]
    begin = [tokenizer.bos_id] if begins and tokenizer.bos_id is not None else []
    return [[*begin, *tokenizer.ids(text.encode(errors="replace")).tolist()] for text in prompts]


def _end_of_turn(chat: ChatTemplate) -> int | None:
    """The special token that ends an answer; None if there is none, or this template wants other conversations."""
    try:
        tokens = chat.tokens([dict(each) for each in _CONVERSATION], None)
    except NotRendered:
        return None
    assert tokens.predicted is not None
    last = int(tokens.ids[tokens.predicted][-1])
    return last if last in chat.special_ids else None
