"""The evaluations of one rank: config to objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from areal_ray.config import Config, EarlyStoppingConfig
from areal_ray.config.eval_rules import label_of
from areal_ray.data import GlobalBatches, TokenDataset, build_tokenizer
from areal_ray.data.byte_lengths import byte_lengths
from areal_ray.data.rendering.special import prompt_ids, trained_tokens
from areal_ray.engine import Objective, TrainEngine
from areal_ray.engine.next_token import NextToken
from areal_ray.run.logs.event_index import STOPPED_EARLY
from areal_ray.train import loop
from areal_ray.train.averaged_evaluation import AveragingEvaluator
from areal_ray.train.cadence import Cadence, EverySteps
from areal_ray.train.early_stopping import EarlyStopping
from areal_ray.train.evaluation import Evaluations, Evaluator, Planned
from areal_ray.train.generation import Generation, texts
from areal_ray.train.own_evaluation import OwnEvaluation, build_evaluator
from areal_ray.worker.start import Start


def build_evaluations(
    config: Config,
    start: Start,
    engine: TrainEngine,
    objective: Objective,
    held_out: TokenDataset,
    sets: Mapping[str, TokenDataset],
    batches: Callable[[TokenDataset], GlobalBatches],
    cadence: Cadence,
    context: loop.RunContext,
    wait_for_copy: Callable[[], None],
) -> Evaluations:
    """Make what evaluates the model while it is trained. A collective.

    Args:
        config: checked.
        start: of the workers.
        engine: initialised.
        objective: what is minimised.
        held_out, sets: rows of what is held out of the data, and of the evaluation sets by their names.
        batches: global batches of rows.
        cadence: of eval.every_steps; part of the state of a run.
        context: the job around the loop.
        wait_for_copy: waits for copies of the weights that are being made.
    """
    settings, batch = config.eval, config.train.global_batch_size
    scored = objective
    if settings.metrics:
        scored = NextToken(objective, settings.metrics, _byte_lengths(config, start, engine.device))

    def alive() -> None:
        context.enter("evaluate")

    def at_length() -> None:
        context.enter("other evaluation")  # of no usual length, so that it has the watchdog's patience

    def of(rows: TokenDataset, count: int, prefix: str) -> Evaluator:
        args = engine, lambda: batches(rows), count, scored, alive, prefix
        if settings.ema:
            return AveragingEvaluator(*args, averaged=engine.averaged, wait_for_copy=wait_for_copy)
        return Evaluator(*args)

    # A cadence of its own is a matter of the step alone, and leaves nothing in the state of a run.
    def when(every_steps: int | None) -> Cadence:
        return cadence if every_steps is None else EverySteps(every_steps)

    planned = list[Planned]()
    if settings.every_steps and len(held_out):
        planned.append(Planned(cadence, of(held_out, settings.batches, "held_out_")))
    for name, rows in sets.items():
        each = settings.sets[name]
        count = min(each.batches or settings.batches, max(1, len(rows) // batch))  # nothing twice
        planned.append(Planned(when(each.every_steps), of(rows, count, f"held_out/{name}/")))
    if settings.generate is not None:
        planned.append(Planned(when(settings.generate.every_steps), _generation(config, start, engine, at_length)))
    for i, own in enumerate(settings.evaluators):
        made, tokenizer = build_evaluator(own, f"eval.evaluators[{i}]"), build_tokenizer(config.data.tokenizer)
        by = OwnEvaluation(made, label_of(own), engine, tokenizer, start.ranks, at_length)
        planned.append(Planned(when(own.every_steps), by))
    return Evaluations(planned, config.train.steps)


def _generation(config: Config, start: Start, engine: TrainEngine, alive: Callable[[], None]) -> Generation:
    """Make what goes on with prompts; only rank 0 has the tokenizer. A collective."""
    wanted = config.eval.generate
    assert wanted is not None
    tokenizer = build_tokenizer(config.data.tokenizer) if start.first else None

    def known() -> tuple[list[list[int]], list[int], int]:
        assert tokenizer is not None
        ends = [
            *trained_tokens(config.data, tokenizer)["ends"],
            *([] if tokenizer.eos_id is None else [tokenizer.eos_id]),
        ]
        return prompt_ids(config.data, tokenizer, wanted.prompts, wanted.chat), ends, tokenizer.vocab_size

    prompts, ends, vocabulary = start.ranks.on_rank_zero(known)

    def write(step: int, made: list[list[int]]) -> None:
        assert tokenizer is not None
        decode = tokenizer.transformers().decode
        try:
            start.run.write_generations(step, texts(wanted.prompts, made, ends, decode))
        except OSError as error:  # a page less is no reason to lose the step
            start.say(f"could not write the generations of step {step}: {error}")

    chosen = engine, start.ranks, wanted, prompts, ends, vocabulary, config.run.seed
    return Generation(*chosen, write, alive)


def early_stopping(config: EarlyStoppingConfig, start: Start) -> EarlyStopping:
    """Make the rule by which the run ends early; rank 0 says when, and writes it down for the driver."""

    def tell(fields: dict[str, Any], sentence: str) -> None:
        if start.first:
            start.say(sentence)
            start.run.note(STOPPED_EARLY, start.say, attempt=start.attempt, **fields, rule=asdict(config))

    return EarlyStopping(config, start.ranks.agree, tell)


def _byte_lengths(config: Config, start: Start, device: torch.device) -> torch.Tensor | None:
    if "bits_per_byte" not in config.eval.metrics:
        return None
    lengths = start.ranks.on_rank_zero(lambda: byte_lengths(build_tokenizer(config.data.tokenizer)))
    return torch.from_numpy(lengths).to(device)
