"""What all peers share, so that nothing but their own ways differs: model, data, and the log of finished steps.

No areal_ray in here. The epochs of the tutorials' scripts are `every` steps long (or endless), as theirs save once an
epoch.
"""

from __future__ import annotations

import json
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "encodings"}


@dataclass(frozen=True)
class Work:
    """One run of a peer.

    Args:
        folder: of the run; `log` in it has the step logs, `storage` is for checkpoints.
        model: arguments of a transformers config, model_type among them.
        seq_len: tokens.
        rows: sequences per step of one rank, in one micro-batch.
        steps: length of the run.
        every: steps between two saves; None: never.
        lr: learning rate.
        workers: ranks; or [min, max] for a peer that can change their number.
    """

    folder: str
    model: dict[str, Any]
    seq_len: int
    rows: int
    steps: int
    every: int | None
    lr: float
    workers: Any

    @property
    def storage(self) -> Path:
        return Path(self.folder) / "storage"

    @property
    def log(self) -> Path:
        return Path(self.folder) / "log"

    def write(self) -> str:
        """Make the folders and put this into `work.json`; its path."""
        self.storage.mkdir(parents=True)
        self.log.mkdir()
        path = Path(self.folder) / "work.json"
        path.write_text(json.dumps(asdict(self)))
        return str(path)

    @classmethod
    def read(cls, path: str) -> Work:
        return cls(**json.loads(Path(path).read_text()))


class StepLog:
    """One line per finished step of one rank, with the time and the process id; all figures are read from these."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self._file = open(Path(folder) / f"rank-{rank}.jsonl", "a", buffering=1)  # noqa: SIM115  (open as long as the process)
        self._rank, self._first = rank, True
        self._write({"event": "start"})

    def step(self, step: int) -> None:
        """`step`, counted from 1, is finished."""
        self._write({"event": "step", "step": step})
        if self._first:  # what it trains with: by now all is set, and this is the thread that trains
            self._write({"event": "settings", "threads": torch.get_num_threads(), "nice": os.nice(0)})
            self._first = False

    def note(self, event: str, **fields: Any) -> None:
        self._write({"event": event, **fields})

    def _write(self, fields: dict[str, Any]) -> None:
        self._file.write(json.dumps({"time": time.time(), "rank": self._rank, "pid": os.getpid(), **fields}) + "\n")


def read_log(folder: str | Path, rank: int = 0) -> list[dict[str, Any]]:
    """The lines of one rank, oldest first; a last one that is still being written is left out."""
    path = Path(folder) / f"rank-{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def build_model(work: Work) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**work.model)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


class Text(Dataset):
    """The source of Python's standard library as bytes, cut into sequences; items are {"input_ids": (S,)}.

    The same files as areal_ray's `source: stdlib`.
    """

    def __init__(self, seq_len: int) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        files.sort(key=lambda path: path.relative_to(root).as_posix())
        data = b"\0".join(path.read_bytes() for path in files)
        self._sequences = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: len(data) // seq_len * seq_len]
        self._sequences = self._sequences.view(-1, seq_len)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._sequences[index].long()}


def endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
