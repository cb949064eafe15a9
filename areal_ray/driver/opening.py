"""What a run is about to do, said before its workers start: data, model, and the size of a step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from areal_ray import models
from areal_ray.config import Config
from areal_ray.data.corpus.corpus import Corpus, TokenSource
from areal_ray.data.splits import Splits
from areal_ray.engine.optim import freeze
from areal_ray.models.operations import operations_per_token


def opening(config: Config, model: nn.Module, splits: Splits, sources: Mapping[str, TokenSource]) -> list[str]:
    """Lines about a run that is about to start.

    Args:
        config: checked.
        model: on the meta device; parameters that are frozen need no gradient.
        splits: rows to train on and held out.
        sources: that the rows are from, by name; none for a source of one's own.
    """
    return [f"data: {_data(config, splits, sources)}", f"model: {_model(model)}", f"step: {_step(config)}"]


def _data(config: Config, splits: Splits, sources: Mapping[str, TokenSource]) -> str:
    rows, held_out = map(len, splits)
    steps = max(1, round(rows / config.train.global_batch_size))
    tokens = "; ".join(f"{name}: {_tokens(each)}" if name else _tokens(each) for name, each in sources.items())
    sequences = f"{rows:,} sequences of {config.train.seq_len:,}, {_count(steps, 'step')} an epoch"
    return f"{tokens + ': ' if tokens else ''}{sequences}; {held_out:,} sequences held out"


def _tokens(source: TokenSource) -> str:
    documents = f"{source.manifest.count('train', 'documents'):,} documents, " if isinstance(source, Corpus) else ""
    return f"{documents}{len(source.split('train')):,} tokens"


def _model(model: nn.Module) -> str:
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    part = "" if trained == every else f", of which {trained:,} are trained ({trained / every:.2%})"
    return f"{type(model).__name__}, {every:,} parameters{part}"


def _step(config: Config) -> str:
    train, sizes = config.train, config.usable_sizes
    on = [f"{_micro_batches(config, size)} on each of {_count(size, 'worker')}" for size in dict.fromkeys(_ends(sizes))]
    tokens = train.global_batch_size * train.seq_len
    batch = _count(train.global_batch_size, "sequence")
    return f"{batch} ({tokens:,} tokens): {', or '.join(on)}"


def _micro_batches(config: Config, workers: int) -> str:
    """How a worker takes its part of the global batch; the workers of a tensor group have the same part."""
    train = config.train
    rows = train.global_batch_size // (workers // config.engine.mesh.tensor)
    size = min(rows, train.micro_batch_size)
    return f"{_count(-(-rows // size), 'micro-batch', 'micro-batches')} of {size}"


def _ends(sizes: list[int]) -> tuple[int, int]:
    return sizes[0], sizes[-1]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def counted_operations(config: Config) -> tuple[float | None, str]:
    """Operations of the model for a position, and why they are not known; (None, "") where nobody could use them.

    Args:
        config: checked. Without a GPU, or a peak that it names, there is no utilisation to be told.
    """
    if not config.cluster.use_gpu and config.logging.peak_tflops is None:
        return None, ""
    model, _ = models.build_adapted(config.model, config.adapter, config.engine.precision or "")
    freeze(model, config.optim.groups)
    try:
        return operations_per_token(model, config.train.seq_len), ""
    except ValueError as error:
        hint = "a method operations_per_token(seq_len) of the model would tell"
        return None, f"mfu will not be known, as the model's operations cannot be counted ({error}): {hint}"
