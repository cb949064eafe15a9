"""What the loop is given in its tests instead of an engine, checkpoints and Ray."""

import json
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import torch

from areal_ray.data import PackedTokens
from areal_ray.engine import EvalResult, Objective, StepResult
from areal_ray.train.bad_steps import BadStepPolicy
from areal_ray.train.recovery import PendingSave

TOTAL = 22  # steps
SEQUENCES = PackedTokens(np.repeat(np.arange(300, dtype=np.uint16), 2), 2)


class Crash(Exception):
    pass


class NoObjective(Objective):
    """Never asked for anything: the engine below makes its losses up."""

    def model_inputs(self, batch):
        raise NotImplementedError

    weight = loss = model_inputs


class Engine:
    """A model of one number, which depends on every batch so far and their order.

    `spoiled` are calls of forward_backward, counted from 1, whose loss is not a number.
    """

    device, dp_rank, dp_size, lr, skips_on_device = torch.device("cpu"), 0, 1, 0.1, True

    def __init__(self, spoiled=()):
        self.weight, self.evaluated, self.spoiled, self.calls = 0.5, 0, spoiled, 0
        self.schedule = 0  # steps of it, computed or not
        self.next = None  # the weight after the step that was computed
        self.state = self

    def forward_backward(self, batch, objective):
        assert self.next is None, "a step was neither taken nor left out"
        self.calls += 1
        self.next = (self.weight * 31 + float(batch["input_ids"].sum())) % 97
        loss = torch.tensor(torch.nan if self.calls in self.spoiled else self.next)
        return StepResult(loss, 2 * loss, self.lr)

    def optimizer_step(self, refused=None):
        if refused is None or not refused:
            self.weight = self.next
        self.next = None

    def skip_step(self):
        self.next = None

    def lr_scheduler_step(self):
        self.schedule += 1

    def evaluate(self, batch, objective):
        self.evaluated += 1
        weight = float(batch["input_ids"].sum())
        return EvalResult(torch.tensor(self.weight + weight, dtype=torch.float64), torch.tensor(weight))

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


class Recover:
    """Saves states as JSON to `kept`, with the metrics that stand in the run directory at that moment."""

    def __init__(self, state, run, kept):
        self.state, self.run, self.kept, self.info = state, run, kept, {}
        self.steps, self.musts, self.lines, self.finished, self.copied = [], [], [], 0, []

    def newest(self):
        return f"step-{max(self.kept):08d}.a1" if self.kept else None

    def is_older(self, name):
        return False

    def restore_from_memory(self):
        return None

    def load(self):
        if not self.kept:
            return None
        saved = json.loads(self.kept[max(self.kept)])
        for name, part in self.state.items():  # one that is new goes on from what it has, as in checkpoint/reader.py
            part.load_state_dict(saved.get(name, part.state_dict()))
        return self.newest()

    def save(self, step, metrics, must=False):
        self.kept[step] = json.dumps({name: part.state_dict() for name, part in self.state.items()}, sort_keys=True)
        self.steps.append(step)
        self.musts.append(must)
        self.lines.append([line["step"] for line in self.run.metrics()])
        manifest = Future()
        manifest.set_result(None)
        return PendingSave(f"step-{step}", step, manifest)

    def save_to_memory(self, step):
        self.copied.append(step)

    def wait_for_copy(self): ...

    def finish(self):
        self.finished += 1


class Journal:
    """Hears of steps that are left out."""

    def __init__(self):
        self.heard = []

    def refused(self, refusal, first_sample, samples):
        self.heard.append((refusal.step, refusal.action, refusal.reason, first_sample, samples))


class Run:
    """A RunContext that keeps what it is told, and dies before a step."""

    def __init__(self, dies_at, leaves_at=None):
        self.began, self.saves, self.dies_at, self.leaves_at = [], [], dies_at, leaves_at
        self.phases = []

    def check(self): ...

    def enter(self, phase):
        self.phases.append(phase)

    def leaving(self):
        return self.began[-1] == self.leaves_at

    def before_step(self, step):
        if step == self.dies_at:
            raise Crash
        self.began.append(step)

    def saving(self, save, metrics):
        self.saves.append((save.step, dict(metrics)))


class Steps:
    """Steps as the loop asks about them; `heard` has the refusals."""

    lag = 0

    def __init__(self, config, known=(), lag=None):
        config = replace(config, lag=self.lag if lag is None else lag)
        self.heard, self.step = [], 0
        self.guard = BadStepPolicy(config, known, self.heard.append)

    def take(self, loss, grad_norm=1.0):
        """(accepted, back to the last checkpoint)"""
        (verdict,) = [judged.verdict for judged in self.judge(loss, grad_norm, now=True)]
        return verdict == "take", verdict == "rollback"

    def judge(self, loss, grad_norm=1.0, now=False):
        """What is known of the steps after one more of them."""
        self.step += 1
        result = StepResult(torch.tensor(loss), torch.tensor(grad_norm), 0.1)
        skipped = self.guard.is_skipped(self.step)
        update = self.guard.judge(self.step, None if skipped else result, range(8 * self.step, 8 * self.step + 8))
        taken = update.wanted if update.refused is None else not update.refused
        known = self.guard.settle(now)
        assert all(taken == (judged.verdict == "take") for judged in known if judged.step == self.step)
        return known

    def accepted(self, *losses):
        return [self.take(loss)[0] for loss in losses]
