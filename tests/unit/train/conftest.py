"""A run as the worker starts it, with an engine and checkpoints that are made up."""

from dataclasses import replace

import pytest

from areal_ray.checkpoint import Catalog
from areal_ray.config import load
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.loop import train
from areal_ray.worker.job import Data, build_job
from areal_ray.worker.start import Start
from tests.unit.config.test_config import TINY

from .loop_fakes import SEQUENCES, TOTAL, Crash, Engine, Journal, NoObjective, Recover, Run

CONFIG = load(
    TINY,
    [
        f"train.steps={TOTAL}",
        "train.global_batch_size=4",
        "train.seq_len=2",
        "optim.warmup_steps=0",
        "checkpoint.every_steps=7",
        "eval.batches=2",
        "logging.every_steps=4",
    ],
)


class NoReceipt:
    """Restores as worker/wiring.py has it, but for the receipt: the state here is not that of a real engine."""

    def __init__(self, restore):
        restore._receipt = lambda *_, **__: None
        self._restore = restore

    def at_start(self):
        self._restore.at_start("1 worker")


@pytest.fixture(params=[0, 1], ids=["at once", "a step later"])
def start(tmp_path, request):
    """Start (or go on with) a run as the worker does; its Job, after training. `lag` is of all of a test's runs."""
    kept = {}

    def start(
        last_step=TOTAL,
        dies_at=None,
        evaluate=5,
        name="run",
        spoiled=(),
        on_bad="skip",
        known=(),
        copy=None,
        lag=request.param,
        leaves_at=None,
        every=7,
        log=4,
        engine=Engine,
        sets=None,
        evaluation=None,
    ):
        bad_step = replace(CONFIG.train.bad_step, on_bad=on_bad, lag=lag)
        config = replace(
            CONFIG,
            train=replace(CONFIG.train, stop_at=last_step, bad_step=bad_step),
            logging=replace(CONFIG.logging, every_steps=log),
            checkpoint=replace(CONFIG.checkpoint, memory_every_steps=copy, every_steps=every),
            eval=evaluation or replace(CONFIG.eval, every_steps=evaluate),
        )
        storage = LocalStorage(tmp_path / name)
        storage.ensure()
        run, states = RunDir(storage), kept.setdefault(name, {})
        for step in known:
            run.event("bad_step", step=step, action=on_bad)
        journal = Journal()
        here = Start(1, run, Ranks(), lambda text: None, Catalog(storage))
        job, restore = build_job(
            config,
            here,
            engine(spoiled),
            Data(SEQUENCES, SEQUENCES, sets or {}),
            NoObjective(),
            Run(dies_at, leaves_at),
            lambda state: Recover(state, run, states),
            journal,
            RuntimeError,
            beside=start.beside,
            pulse=start.pulses.append,
        )
        job.refused = journal.heard
        start.jobs.append(job)
        NoReceipt(restore).at_start()
        if dies_at is None:
            train(job)
        else:
            with pytest.raises(Crash):
                train(job)
        return job

    start.kept, start.lag, start.jobs, start.beside, start.pulses = kept, request.param, [], [], []
    return start
