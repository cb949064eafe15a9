"""The usual failures, raised by what raises them in a run, and the panel of each: its cause, and what to try."""

import errno
import os

import pytest
import torch

from areal_ray.cluster.failures import Cause, annotate, cause_of
from areal_ray.cluster.killers import kernel_says, with_killer
from areal_ray.config import BadStepConfig, load
from areal_ray.data import PackedTokens
from areal_ray.data.batches import GlobalBatches
from areal_ray.driver.hints import hint
from areal_ray.driver.panel import show
from areal_ray.engine.base import StepResult
from areal_ray.storage import LocalStorage
from areal_ray.train.bad_steps import BadStepPolicy
from tests.small_disk import small_disk

pytestmark = pytest.mark.unit
CONFIG = load("conf/experiments/tiny.yaml", ["checkpoint.keep.last=8", "run.storage_path=/runs"])
TABLE = load("conf/experiments/tiny.yaml", ["model.config.model_type=gpt2", "model.config.max_position_embeddings=16"])
SMALL = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


class Failed(Exception):
    """As Ray Train raises: with the exceptions of the workers."""

    def __init__(self, errors):
        self.worker_failures = errors


def panel(run, capsys, cause, config=CONFIG):
    show(cause, run, "/tmp/ray/logs", hint(cause, config, run))
    told = capsys.readouterr().err.partition("── training failed")[2]  # transformers may have said something before
    rows = dict(line.split(maxsplit=1) for line in told.splitlines()[1:-1])
    print("\n".join(f"{name}: {rows[name]}" for name in ("cause", "try") if name in rows))
    return rows


def forward(ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_positions=16, **SMALL))(input_ids=ids)


def host_memory(tmp_path):
    torch.empty(1 << 58)


def token_beyond_the_rows(tmp_path):
    forward(torch.tensor([[3, 300]]))


def position_beyond_the_table(tmp_path):
    forward(torch.zeros(1, 17, dtype=torch.long))


def shapes(tmp_path):
    torch.nn.Linear(4, 3)(torch.zeros(2, 256))


def not_finite(tmp_path):
    nan = torch.tensor(float("nan"))
    BadStepPolicy(BadStepConfig(), [], lambda _: None).judge(7, StepResult(nan, nan, 0.1), range(48, 56))


def full_disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        LocalStorage(disk.path).replace("shard", bytes(2 << 20))


def used_up_quota(tmp_path):  # no file system here has any: as the C library words it
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def refused_by_the_system(tmp_path):
    raise PermissionError("s3://runs/run: ACCESS_DENIED (PutObject): Access Denied.")


def other_data(tmp_path):
    def batches(tokens):
        return GlobalBatches(PackedTokens(torch.arange(tokens, dtype=torch.int32).numpy(), 2), 0, 4, 0, 1)

    batches(42).load_state_dict(batches(40).state_dict())


@pytest.mark.parametrize(
    ("fail", "cause", "parts"),
    [
        (
            host_memory,
            r"RuntimeError: ",
            ["too little memory for what was asked of it: 2 workers need", "checkpoint.memory_every_steps=null"],
        ),
        (token_beyond_the_rows, "IndexError: index out of range", ["the model has 264 rows", "areal-ray data sample"]),
        (position_beyond_the_table, "IndexError: index out of range", ["train.seq_len=256; it has 16 positions"]),
        (shapes, "RuntimeError: mat1 and mat2 shapes", ["input_ids of shape (4, 256)"]),
        (not_finite, "BadStepError: step 7: loss nan", ["optim.lr (now ", "train.bad_step.on_bad=skip"]),
        (full_disk, "OSError: [Errno 28] No space left", ["/runs", "areal-ray ckpt gc", "checkpoint.keep.last=3"]),
        (used_up_quota, "OSError: [Errno 122] Disk quota", ["its quota used up", "checkpoint.keep.last=3"]),
        (refused_by_the_system, "PermissionError: s3://runs/run", ["/runs refuses the credentials: see run.s3"]),
        (other_data, "ValueError: the data is not what", ["run.allow_changes='[data]'"]),
    ],
)
def test_what_usually_fails_has_a_panel_that_says_what_to_try(run, tmp_path, capsys, fail, cause, parts):
    run.event("attempt", attempt=1, world_size=2, pids=[40, 41], nodes=["node-a", "node-b"])
    try:
        fail(tmp_path)
        pytest.fail("nothing was raised")
    except Exception as raised:  # noqa: BLE001  (each its own, as the cause has it)
        annotate(raised, step=7)
        error = raised
    config = TABLE if fail is position_beyond_the_table else CONFIG
    rows = panel(run, capsys, cause_of(Failed({1: error}), run), config)
    assert rows["cause"].startswith(cause)
    assert [part for part in parts if part not in rows["try"]] == []
    assert ".py:" in rows["at"]
    assert rows["worker"].startswith("rank 1 on node ")


def test_a_process_that_the_kernel_has_killed_has_a_panel_that_says_who_and_what_to_try(run, capsys):
    run.event("attempt", attempt=1, world_size=2, pids=[40, 41], nodes=["node-a", "node-b"])
    log = "[9.5] Out of memory: Killed process 41 (ray::RayTrainWo) total-vm:9kB, anon-rss:12300000kB, file-rss:0kB"
    died = Cause(1, "the worker process died", "Worker exit type: SYSTEM_ERROR", infrastructure=True, node="10.0.0.7")
    cause = with_killer(died, run, lambda node, pid: kernel_says(pid, lambda: log, lambda: 0))
    rows = panel(run, capsys, cause)
    assert rows["cause"].endswith("the kernel has killed it when it had 12.3 GB, as memory of the machine ran out")
    assert rows["try"].startswith("the machine has too little memory, and something was killed to make room")
    rows = panel(run, capsys, with_killer(died, run, lambda *_: None))
    assert rows["try"].startswith("neither Ray nor the kernel says who has ended the process")
