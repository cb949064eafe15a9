"""Special tokens of an export: the same in config, generation config and tokenizer, as the model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_ray.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenNames:
    """Special tokens by their text, where others are wanted than those that the model was trained with."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens.

    Args:
        bos: beginning of a text; None: there is none.
        ends: each of which ends an answer, the first one of them a turn of a chat if there are turns.
        pad: fills rows; None: there is none.
        begins: whether a text begins with bos.
        own_pad: whether pad means nothing else. transformers gives the row of config.pad_token_id no gradients, and a
            model that is trained further must go on learning where a text ends.
    """

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    begins: bool
    own_pad: bool


def special_tokens(
    tokenizer: Any, known: Tokenizer, serving: Mapping[str, Any], source: Mapping[str, Any], names: TokenNames
) -> SpecialTokens:
    """Find the special tokens, and have the tokenizer of transformers that is written know them, too.

    Args:
        tokenizer: of transformers; changed.
        known: the same, of this package.
        serving: of the manifest; empty for a checkpoint of an earlier version.
        source: generation config of the pretrained model that training began with; may be empty.
        names: that are wanted instead.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    trained = serving.get("tokens") or {}
    named = {role: _id_of(tokenizer, getattr(names, role), role) for role in ("bos", "eos", "pad")}
    if template := trained.get("chat_template"):
        tokenizer.chat_template = template
    for role, number in named.items():
        if number is not None:
            setattr(tokenizer, f"{role}_token", getattr(names, role))
    given = source.get("eos_token_id")
    if named["eos"] is not None:
        ends = [named["eos"]]
    else:
        ends = [*trained.get("ends", []), *([] if known.eos_id is None else [known.eos_id])]
        ends += given if isinstance(given, list) else [] if given is None else [given]
    pad = tokenizer.pad_token_id
    if pad is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        pad = tokenizer.eos_token_id
    begins = bool(trained.get("begins", known.adds_bos))
    if begins != known.adds_bos and tokenizer.is_fast and hasattr(tokenizer, "update_post_processor"):
        tokenizer.add_bos_token = begins  # as texts were trained, so that others prompt it so
    bos = tokenizer.bos_token_id
    unique = tuple(dict.fromkeys(int(each) for each in ends))
    return SpecialTokens(bos, unique, pad, begins, own_pad=pad is not None and pad not in unique)


def in_config(config: Mapping[str, Any], tokens: SpecialTokens, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with these tokens.

    Args:
        config: as recorded.
        tokens: those of the tokenizer.
        fixed: keys of it that the user has set by hand, which stay.
    """
    ends = tokens.ends[0] if len(tokens.ends) == 1 else list(tokens.ends) or None
    pad = {"pad_token_id": tokens.pad} if tokens.own_pad else {}
    found = {"bos_token_id": tokens.bos, "eos_token_id": ends, **pad}
    return {**config, **{key: value for key, value in found.items() if key not in fixed}}


def generation_config(tokens: SpecialTokens | None, config: Mapping[str, Any], source: Mapping[str, Any]) -> Any:
    """generation_config.json: that of the pretrained model, with the tokens as they were trained.

    Args:
        tokens: of the tokenizer; None if there is none: those of the config.
        config: config.json.
        source: generation config of the pretrained model; may be empty.
    """
    found = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
    }
    if tokens is not None and tokens.pad is not None:
        found["pad_token_id"] = tokens.pad
    return {**source, **found}


def _id_of(tokenizer: Any, text: str | None, role: str) -> int | None:
    if text is None:
        return None
    number = tokenizer.get_vocab().get(text)
    if number is None:
        raise ValueError(f"the tokenizer has no token {text!r}, which is to be its {role} token")
    return int(number)
