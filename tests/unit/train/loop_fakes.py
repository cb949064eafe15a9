"""What the loop is given in its tests instead of an engine, checkpoints and Ray."""

import json
from concurrent.futures import Future

import torch

from areal_ray.engine.base import finite
from areal_ray.train.recovery import PendingSave


class Crash(Exception):
    pass


class Engine:
    """A model of one number, which depends on every batch so far and their order.

    `spoiled` are calls of train_batch, counted from 1, whose loss is not a number.
    """

    def __init__(self, spoiled=()):
        self.weight, self.evaluated, self.spoiled, self.calls = 0.5, 0, spoiled, 0
        self.schedule = 0  # steps of it, computed or not
        self.accept = finite

    def train_batch(self, batch, loss_fn, loss_weight_fn):
        self.calls += 1
        self.schedule += 1
        weight = (self.weight * 31 + float(batch["input_ids"].sum())) % 97
        loss = torch.tensor(torch.nan if self.calls in self.spoiled else weight)
        accepted = self.accept(float(loss), 2 * float(loss))
        if accepted:
            self.weight = weight
        return {"loss": loss, "grad_norm": 2 * loss, "lr": 0.1, "skipped": not accepted}

    def skip_batch(self):
        self.schedule += 1
        return {"loss": torch.tensor(torch.nan), "grad_norm": torch.tensor(torch.nan), "lr": 0.1, "skipped": True}

    def eval_batch(self, batch, loss_fn, loss_weight_fn):
        self.evaluated += 1
        weight = float(batch["input_ids"].sum())
        return {"loss": torch.tensor(self.weight + weight, dtype=torch.float64), "weight": torch.tensor(weight)}

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


class Recover:
    """Dumps states as JSON to `kept`, with the metrics that stand in the run directory at that moment."""

    def __init__(self, state, run, kept):
        self.state, self.run, self.kept = state, run, kept
        self.steps, self.musts, self.lines, self.finished, self.remembered = [], [], [], 0, []

    def load(self):
        if not self.kept:
            return None
        for name, values in json.loads(self.kept[max(self.kept)]).items():
            self.state[name].load_state_dict(values)
        return f"step-{max(self.kept)}"

    def save(self, step, metrics, must=False):
        self.kept[step] = json.dumps({name: part.state_dict() for name, part in self.state.items()}, sort_keys=True)
        self.steps.append(step)
        self.musts.append(must)
        self.lines.append([line["step"] for line in self.run.metrics()])
        manifest = Future()
        manifest.set_result(None)
        return PendingSave(f"step-{step}", step, manifest)

    def save_to_memory(self, step):
        self.remembered.append(step)

    def finish(self):
        self.finished += 1


class Run:
    """A RunContext that keeps what it is told, and dies before a step."""

    def __init__(self, dies_at, leaves_at=None):
        self.began, self.saves, self.dies_at, self.leaves_at = [], [], dies_at, leaves_at

    def check(self): ...

    def enter(self, phase): ...

    def leaving(self):
        return self.began[-1] == self.leaves_at

    def before_step(self, step):
        if step == self.dies_at:
            raise Crash
        self.began.append(step)

    def saving(self, dump, metrics):
        self.saves.append((dump.step, dict(metrics)))
