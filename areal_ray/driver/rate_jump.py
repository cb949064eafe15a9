"""The learning rate of a run that goes on under another schedule: whether the next step has another one than before."""

from __future__ import annotations

from dataclasses import fields

from areal_ray.checkpoint.catalog import Entry
from areal_ray.config import Config, OptimConfig
from areal_ray.engine.optim.schedule import LrSchedule

_JUMP = 1.25  # times as large or as small; a run that is made longer, or warmed up anew, is far beyond
_OPEN = ("wsd", "constant")  # schedules that go on for as long as they are told
_SHAPE = ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio")


def rate_jump(newest: Entry, config: Config) -> str | None:
    """What is to be said of the learning rate of the first step after a restore; None if it goes on as it was.

    A schedule is a function of the step, so that another `train.steps` or another `optim.*` changes the rate in the
    middle of a run, mostly unasked: a cosine that had come to its end begins high again.

    Args:
        newest: the checkpoint that the run goes on from, with the config that it was made with in its manifest.
        config: of now, with all lengths in steps.
    """
    step, saved = newest.step, newest.info.get("config") or {}
    before, steps = saved.get("optim", {}), saved.get("train", {}).get("steps")
    known = {field.name for field in fields(OptimConfig)} & set(_SHAPE) & set(before)
    if not steps or "lr" not in known:
        return None
    old, new = OptimConfig(**{name: before[name] for name in known}), config.optim
    was, now = _rate(old, steps, step), _rate(new, config.train.steps, step)
    if max(was, now) <= _JUMP * min(was, now):
        return None
    changed = [f"optim.{name} was {getattr(old, name)} and is {getattr(new, name)}" for name in _SHAPE]
    changed = [text for name, text in zip(_SHAPE, changed, strict=True) if getattr(old, name) != getattr(new, name)]
    if steps != config.train.steps:
        changed.append(f"train.steps was {steps} and is {config.train.steps}")
    ending = new.schedule not in _OPEN
    longer = f"optim.schedule={' or '.join(_OPEN)}, or an optim.lr that fits" if ending else "an optim.lr that fits"
    return (
        f"it jumps from {was:.3g} to {now:.3g} after step {step}, as {', '.join(changed)}. To go on as before, put "
        "that back (train.stop_at ends a run early without a change); to train for longer, "
        f"{longer}"
    )


def _rate(config: OptimConfig, steps: int, step: int) -> float:
    schedule = LrSchedule(config, steps)
    schedule.step = step
    return schedule.lr(config.lr)
