"""Hints for the usual failures: what each is taken for, and that its numbers are those of the run."""

import re

import pytest

from areal_ray.cluster.failures import Cause
from areal_ray.config import load
from areal_ray.driver.hints import hint

pytestmark = pytest.mark.unit
CONFIG = load(
    "conf/experiments/tiny.yaml",
    [
        "train.global_batch_size=16",
        "optim.lr=0.25",
        "checkpoint.keep.last=8",
        "run.storage_path=/runs",
        "cluster.collective_timeout_s=77",
        "cluster.num_workers=[1,4]",
        "cluster.use_gpu=true",
        "model.config.model_type=gpt2",
    ],
)


@pytest.mark.parametrize(
    ("kind", "message", "parts"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", ["the device has", "4 workers need about"]),
        ("RuntimeError", "CUDA error: out of memory", ["In this order: train.micro_batch_size=2 (about "]),
        ("RuntimeError", "DefaultCPUAllocator: not enough memory", ["memory_every_steps=null (about ", "standbys=off"]),
        ("the worker process died", "exit; the kernel has killed it for lack of memory", ["the machine has"]),
        ("the worker process died", "killed for lack of memory, by Ray", ["the machine has too little memory"]),
        ("IndexError", "index out of range in self", ["the model has 264 rows", "2,048 positions", "seq_len=256"]),
        ("BadStepError", "step 7: loss nan (not finite)", ["optim.lr (now 0.25)", "on_bad=skip"]),
        ("OSError", "[Errno 28] No space left on device", ["/runs", "checkpoint.keep.last=3"]),
        ("OSError", "[Errno 122] Disk quota exceeded", ["its quota used up"]),
        ("PermissionError", "AccessDenied", ["/runs refuses the credentials"]),
        ("OSError", "EXPIRED_TOKEN (ListObjects): the provided token has expired", ["/runs refuses the credentials"]),
        ("DistBackendError", "Watchdog caught collective operation timeout", ["77 s", "rank 2 (did not) at mine.py:7"]),
        ("ValueError", "ranks [1] read other data than rank 0", ["run.allow_changes='[data]'"]),
        ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied (4x3 and 2x2)", ["(4, 256)"]),
    ],
)
def test_the_usual_failures_come_with_what_to_change(run, kind, message, parts):
    run.event("attempt", attempt=1, world_size=4, pids=[1, 2, 3, 4])
    run.event("stuck", attempt=1, rank=2, waiting=False, where="mine.py:7 in f", seconds=9.0, phase="step")
    told = hint(Cause(1, kind, message), CONFIG, run)
    assert [part for part in parts if part not in told] == []
    assert not re.search(r"-\d", told)


@pytest.mark.parametrize(("kind", "message"), [("KeyError", "'mine'"), ("ValueError", "invalid token 9 at 3")])
def test_of_others_nothing_is_said(run, kind, message):
    assert hint(Cause(1, kind, message), CONFIG, run) is None
