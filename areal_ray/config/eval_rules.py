"""Rules of evaluation and exports beyond keys and types."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from areal_ray.config.data_rules import check_source
from areal_ray.config.errors import ConfigError
from areal_ray.config.eval_schema import EvaluatorConfig
from areal_ray.config.objective_rules import metrics_of
from areal_ray.config.plugin import check_form, is_plugin

if TYPE_CHECKING:
    from areal_ray.config import Config

NEXT_TOKEN = ("perplexity", "bits_per_byte", "accuracy")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_eval(config: Config) -> None:
    """Raise ConfigError for the first rule that evaluation or exports break."""
    evaluation = config.eval
    if evaluation.metrics and config.objective.name not in ("language_modeling", "sft"):
        text = "are of the next token, with language_modeling or sft; an objective of your own has its `metrics`"
        raise ConfigError("eval.metrics", text)
    if other := [name for name in evaluation.metrics if name not in NEXT_TOKEN]:
        raise ConfigError("eval.metrics", f"knows {', '.join(NEXT_TOKEN)}; not {other[0]!r}")
    for name, each in evaluation.sets.items():
        key = f"eval.sets.{name}"
        if not _NAME.fullmatch(name):
            raise ConfigError("eval.sets", f"{name!r} must be letters, digits, '_' or '-', for its metrics")
        check_source(each, key)
        if each.held_out or each.held_out_paths:
            text = "is for data to train on; of an evaluation set all documents are evaluated on"
            raise ConfigError(f"{key}.{'held_out' if each.held_out else 'held_out_paths'}", text)
        for number in ("every_steps", "batches"):
            value = getattr(each, number)
            if value is not None and value <= 0:
                raise ConfigError(f"{key}.{number}", f"must be greater than 0, not {value}")
        _check_due(config, each.every_steps, f"{key}.every_steps")
        if (each.format == "preference") != any(part.format == "preference" for part in config.data.sources.values()):
            raise ConfigError(f"{key}.format", "preference records and other data cannot be evaluated by one objective")
    labels = set(evaluation.sets)
    for i, own in enumerate(evaluation.evaluators):
        check_form(own.name, f"eval.evaluators[{i}].name")
        if not _NAME.fullmatch(label_of(own)):
            text = f"{label_of(own)!r} must be letters, digits, '_' or '-', for its metrics"
            raise ConfigError(f"eval.evaluators[{i}].label", text)
        if label_of(own) in labels:
            text = f"there is another evaluator, or set, {label_of(own)!r}: its metrics need a name of their own"
            raise ConfigError(f"eval.evaluators[{i}].label", text)
        labels.add(label_of(own))
        if own.every_steps is not None and own.every_steps <= 0:
            raise ConfigError(f"eval.evaluators[{i}].every_steps", f"must be greater than 0, not {own.every_steps}")
        _check_due(config, own.every_steps, f"eval.evaluators[{i}].every_steps")
    _check_generate(config)
    _check_early_stopping(config)
    _check_export(config)


def label_of(evaluator: EvaluatorConfig) -> str:
    """The name of an evaluator in metrics."""
    return evaluator.name.partition(":")[2] if evaluator.label is None else evaluator.label


def metric_names(config: Config) -> list[str] | None:
    """Names of the metrics that evaluations give; None if only they know, as some are of the user's own code.

    What data.held_out keeps back is counted with what is evaluated, although there may be nothing in it.
    """
    if config.eval.evaluators or is_plugin(config.objective.name):
        return None
    kinds = ["loss", *metrics_of(config), *config.eval.metrics]
    main = [f"held_out_{kind}" for kind in kinds] if config.eval.every_steps is not None else []
    names = main + [f"held_out/{name}/{kind}" for name in config.eval.sets for kind in kinds]
    return names + ([f"ema_{name}" for name in names] if config.eval.ema else [])


def check_metric(config: Config, metric: str, key: str, *others: str) -> None:
    """Raise ConfigError if no evaluation gives this metric."""
    known = metric_names(config)
    if known is None or metric in (*known, *others):
        return
    if metric.startswith("ema_") and not config.eval.ema:
        raise ConfigError(key, f"{metric} needs eval.ema")
    if metric in ("held_out_loss", "ema_held_out_loss"):
        raise ConfigError(key, f"{metric} needs eval.every_steps")
    raise ConfigError(key, f"must be {' or '.join([*known, *others])}, not {metric!r}")


def _check_due(config: Config, every_steps: int | None, key: str) -> None:
    if every_steps is None and config.eval.every_steps is None:
        raise ConfigError(key, "is not given, and eval.every_steps is null: it would never be due; set one of them")


def _check_generate(config: Config) -> None:
    generate = config.eval.generate
    if generate is None:
        return
    if not generate.prompts or not all(generate.prompts):
        raise ConfigError("eval.generate.prompts", "must be texts, one at least, and none of them empty")
    if generate.temperature < 0:
        raise ConfigError("eval.generate.temperature", f"must be 0 or more, not {generate.temperature}")
    _check_due(config, generate.every_steps, "eval.generate.every_steps")


def _check_early_stopping(config: Config) -> None:
    stopping = config.eval.early_stopping
    if stopping is None:
        return
    if stopping.min_delta < 0:
        raise ConfigError("eval.early_stopping.min_delta", f"must be 0 or more, not {stopping.min_delta}")
    check_metric(config, stopping.metric, "eval.early_stopping.metric")


def _check_export(config: Config) -> None:
    export = config.export
    if export is None:
        return
    if export.model_class is not None:
        check_form(export.model_class, "export.model_class")
        if config.model.factory is None:
            raise ConfigError("export.model_class", "is for model.factory, which is not set")
    if export.every_steps is None and not export.at_end:
        raise ConfigError(
            "export", "every_steps is null and at_end is false: nothing would be exported; or export=null"
        )
