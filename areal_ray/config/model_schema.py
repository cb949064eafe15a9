"""The model's part of the schema: every key, its type, its default and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class NameConfig:
    """A change of the names of weights: what a regular expression finds in them is replaced, as `re.sub` does."""

    pattern: str
    replace: str = ""


@dataclass(frozen=True)
class ModelConfig:
    config: dict[str, Any] = field(default_factory=dict)  # arguments of a transformers config, model_type among them
    # The first weights: a Hugging Face directory or hub name, a peft adapter, a run or checkpoint of areal_ray (all of
    # them say what model it is), or a directory of DCP, beside config or factory; the last two may be in s3://
    path: str | None = None
    factory: str | None = None  # instead: "package.module:function", called with args, returns an nn.Module
    args: dict[str, Any] = field(default_factory=dict)
    merge_adapter: str | None = None  # a directory of peft (LoRA) whose changes are added to the weights of path
    names: list[NameConfig] = field(default_factory=list)  # of the weights in path, one change after the other
    allow_missing: list[str] = field(default_factory=list)  # patterns of weights that path need not have: drawn by seed
    allow_unused: list[str] = field(default_factory=list)  # patterns of names in path that are no weights of the model
    # null: as the config says, but not where path has two different matrices for head and embedding, as transformers
    tie: bool | None = None  # whether they are one
    # auto: sdpa (torch's scaled_dot_product_attention) where the model has it, and else eager
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    # logits: of all tokens at once · chunked: of some rows at a time, so that memory does not grow with the vocabulary
    loss: Literal["auto", "logits", "chunked"] = "auto"  # auto: chunked from 256 MiB of float32 logits on
    shard_units: list[str] = field(default_factory=list)  # class names sharded one by one; default: the model's own
