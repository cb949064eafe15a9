"""The first save after a restart beside the ones that follow it: 30M parameters, two workers, one of them killed."""

from __future__ import annotations

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

from . import arms, report
from .bounds import FIRST_SAVE
from .options import Options

MODEL = (  # 31.6M parameters
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1536",
    "model.config.num_hidden_layers=10",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=4",
    "train.seq_len=64",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
)
EVERY, KILLED_AT, STEPS = 5, 12, 40  # restored at step 10, or a little later


def blocked() -> tuple[float, list[float]]:
    """Seconds blocked by the first save after the kill, and by each of the later ones, on rank 0."""
    kill = f"faults=[{{kind: sigkill, rank: 1, step: {KILLED_AT}}}]"
    task = arms.Task(STEPS, EVERY, 2, (*MODEL, kill))
    with arms.started("areal_ray", task) as job:
        job.wait_for_end()
        ledger = RunDir(LocalStorage(job.folder / "storage" / arms.NAME))
        saved = [event for event in ledger.events("saved") if event["attempt"] > 1]
    first, *later = (event["blocked_s"] for event in saved)
    report.said("areal_ray", f"first {first:.4f} s, later {', '.join(f'{each:.4f}' for each in later)} s")
    return first, later


def run(options: Options) -> list[dict]:
    rows: dict[str, list[float]] = {"first": [], "later, median": []}
    for _ in range(options.rounds):
        first, later = blocked()
        rows["first"].append(first)
        rows["later, median"].append(sorted(later)[len(later) // 2])
    return [report.show(FIRST_SAVE, "s", rows, "later, median")]
