"""The part of the schema about evaluation and exports: every key, its type, its default and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from areal_ray.config.data_schema import SourceConfig


@dataclass(frozen=True)
class EvalSetConfig(SourceConfig):
    """A held-out set of its own, by its name: all documents of these sources, in rows made as those of training."""

    held_out: float = 0.0  # of an evaluation set everything is evaluated on
    every_steps: int | None = None  # null: with eval.every_steps
    batches: int | None = None  # null: eval.batches


@dataclass(frozen=True)
class GenerateConfig:
    """Texts that the model goes on with, written to generations/step-<step>.json in the run directory."""

    prompts: list[str] = field(default_factory=list)
    chat: bool = False  # each prompt is what a user says, in the chat template of the data
    every_steps: int | None = None  # null: with eval.every_steps
    max_new_tokens: int = 64  # each costs a forward pass over the prompt and what has been made of it
    temperature: float = 0.0  # 0: the likeliest token each time; else drawn, by run.seed and step
    top_k: int | None = None  # drawn from so many of the likeliest; null: from all


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """The run ends when a metric has not improved for so many of its evaluations; the learning rate stays as it is."""

    metric: str = "held_out_loss"
    patience: int = 5  # evaluations in a row
    min_delta: float = 0.0  # by which it must be better than the best so far
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class EvaluatorConfig:
    """An evaluator of one's own."""

    name: str  # package.module:Class, made with args, then called; see areal_ray/train/own_evaluation.py
    label: str | None = None  # in metrics, held_out/<label>/...; null: what stands behind the colon
    args: dict[str, Any] = field(default_factory=dict)
    every_steps: int | None = None  # null: with eval.every_steps


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int | None = 50  # null: only what has a cadence of its own
    batches: int = 8  # global batches of held-out text
    ema: bool = False  # the averages of optim.ema, too: ema_held_out_loss and so on, for twice the time
    metrics: list[str] = field(default_factory=list)  # beside the loss: perplexity, bits_per_byte, accuracy
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)  # beside what data.held_out keeps, by name
    generate: GenerateConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    evaluators: list[EvaluatorConfig] = field(default_factory=list)


@dataclass(frozen=True)
class ExportConfig:
    """Hugging Face directories, export/step-<step> in the run directory, made by a process beside the run."""

    every_steps: int | None = None  # each from a checkpoint that is saved at that step; null: only at the end
    at_end: bool = True  # of the run, early stopping included
    keep: int | None = None  # so many of the newest; null keeps all
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # null: float32, as the weights are trained
    shard_mb: float = 5000.0  # largest file
    bos_token: str | None = None  # by its text; null, also below: as the tokenizer has it and texts were trained
    eos_token: str | None = None
    pad_token: str | None = None
    model_class: str | None = None  # package.module:Class of a factory's model, a transformers PreTrainedModel
