"""Seeds: run directories with real checkpoints of two ranks in both formats, real logs, and the shipped configs."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import xxhash
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from areal_ray.checkpoint import Catalog, Manifest, StoredState, read_manifest, save
from areal_ray.checkpoint.format.manifest import STATE, FileRecord
from areal_ray.checkpoint.tree import to_json
from areal_ray.config import redact
from areal_ray.distributed import Ranks
from areal_ray.processes.dcp_pickle import MetadataParts, encode
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.checkpoints import digest
from tests.fuzz.state import CONFIG, ROOT, SAMPLES_PER_STEP, Engine, Job, contents, restore_run

STEPS = (2, 4)
INFO = {
    "config": redact(dataclasses.asdict(CONFIG)),
    "seed": 0,
    "hf_config": {"model_type": "qwen3", "hidden_size": 4},
    "tokenizer": "none",
    "config_hash": "0123456789abcdef",
    "versions": {"areal_ray": "0.1.0", "torch": "2.13.0"},
    "device": "cpu",
    "world_size": 2,
    "mesh": {"shard": 2},
    "accumulate": "unsharded",
}
TENSORS: dict[str, tuple[tuple[int, ...], torch.dtype, int | None]] = {  # name: shape, type, dimension that is cut
    "embed.weight": ((6, 4), torch.float32, 0),
    "layer.weight": ((4, 6), torch.bfloat16, 1),
    "layer.bias": ((5,), torch.float32, 0),
    "norm.weight": ((4,), torch.float32, None),
    "counts": ((2, 3), torch.int64, None),
    "empty": ((0, 3), torch.float32, 0),
    "scale": ((), torch.float32, None),
}


@dataclass(frozen=True)
class Seeds:
    """What cases begin with.

    Args:
        folder: with a run directory `format-1` and `format-2`, and `conf`.
        states: by run directory and checkpoint, what a restore of it brings: bits of tensors, plain values.
        digests: by run directory and checkpoint, as `areal-ray ckpt digest` prints it.
    """

    folder: Path
    states: dict[str, dict[str, Any]]
    digests: dict[str, dict[str, str]]


def tensors(step: int, cut: bool) -> dict[str, Any]:
    """The tensors of the state after a step; cut over the ranks, or as one rank has them."""
    generator = torch.Generator().manual_seed(step)
    mesh = init_device_mesh("cpu", (2,)) if cut else None
    found: dict[str, dict[str, Any]] = {"model": {}, "optim": {}}
    for below in found.values():
        for name, (shape, dtype, dim) in TENSORS.items():
            whole = (torch.randn(shape, generator=generator) * 100).to(dtype)
            placement = Replicate() if dim is None else Shard(dim)
            below[name] = distribute_tensor(whole, mesh, [placement]) if mesh is not None else whole
    return found


def job_at(step: int, cut: bool = False) -> Job:
    job = Job(Engine(tensors(step, cut)))
    job.go_to(step)
    return job


def blank(fill: int) -> Job:
    """A job whose tensors are filled with a byte: what is not restored shows."""
    job = job_at(STEPS[-1])
    for below in job.engine.tensors.values():
        for tensor in below.values():
            tensor.view(-1).view(torch.uint8).fill_(fill) if tensor.numel() else None
    job.go_to(0)
    return job


def make(folder: Path) -> Seeds:
    """Make them in an empty folder; takes a second."""
    (folder / "format-2").mkdir(parents=True)
    mp.start_processes(  # type: ignore[no-untyped-call]
        _save_as_rank, (str(folder),), nprocs=2, start_method="fork"
    )
    _logs(folder / "format-2")
    _as_format_1(folder / "format-2", folder / "format-1")
    shutil.copytree(ROOT / "conf", folder / "conf")
    states: dict[str, dict[str, Any]] = {}
    digests: dict[str, dict[str, str]] = {}
    for name in ("format-1", "format-2"):
        run = LocalStorage(folder / name)
        states[name] = {Catalog.name(step, 1): contents(job_at(step)) for step in STEPS}
        digests[name] = {each: digest(run.sub(each)) for each in states[name]}
        probe = folder / "probe"
        shutil.copytree(folder / name, probe)
        job = blank(0xA5)
        restore_run(probe, job, [])
        assert contents(job) == states[name][Catalog.name(STEPS[-1], 1)], f"{name} does not restore"
        shutil.rmtree(probe)
    return Seeds(folder, states, digests)


def _save_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    for step in STEPS:
        name = Catalog.name(step, 1)
        info = {**INFO, "step": step, "attempt": 1, "time": 1.7e9 + step, "metrics": {"loss": 5.5 - step}}
        save(LocalStorage(f"{folder}/format-2").sub(name), job_at(step, cut=True).state, info, Ranks())
    dist.destroy_process_group()


def _logs(folder: Path) -> None:
    """What a run leaves beside its checkpoints."""
    run = RunDir(LocalStorage(folder))
    run.write_config("run: {name: seed}\n")
    run.event("submitted", overrides=[])
    run.event("attempt", attempt=1, world_size=2, nodes=["a", "b"], pids=[11, 12])
    run.event("started", attempt=1, step=0, reached=0)
    run.event("training", attempt=1, step=1, connect_s=0.1, build_s=0.2, data_s=0.1, restore_s=0.1, step_s=0.3)
    for step in range(STEPS[-1] + 2):
        run.log_metrics(step, {"loss": 5.5 - step, "lr": step * 1e-3, "step_time_s": 0.1})
        run.log_samples(step * SAMPLES_PER_STEP, list(range(SAMPLES_PER_STEP)))
        if step in STEPS:
            run.event("saved", attempt=1, step=step, checkpoint=Catalog.name(step, 1), bytes=9000, blocked_s=0.01)
    run.event("failure", attempt=1, step=5, rank=0, cause="killed", node="a")
    run.event("passed_over", attempt=1, checkpoint=Catalog.name(1, 1), reason="torn")
    catalog = Catalog(run.storage)
    catalog.write_index(catalog.summaries())
    run.next_attempt(1)  # writes the index of the ledger
    run.write_result({"status": "failed", "step": STEPS[-1], "checkpoint": Catalog.name(STEPS[-1], 1)})
    holder = b'{"id": "0011223344556677", "host": "elsewhere", "pid": 4194303, "boot": "b/1", "time": 1.7e9}'
    run.storage.replace("driver.json", holder)


def _as_format_1(source: Path, target: Path) -> None:
    """The same run as it was written before format 2: the layout in `.metadata`, all checksums in the manifest."""
    shutil.copytree(source, target)
    for step in STEPS:
        directory = LocalStorage(target / Catalog.name(step, 1))
        state = StoredState(directory)
        layout, info = state._contents.layout, state.manifest.info
        rows = state._contents.sums(directory, range(layout.shards))
        chunks: dict[str, list[list[Any]]] = {}
        for number, sums in rows.items():
            name = state._contents.files[number]
            data = directory.read(name)
            places = [(int(at), int(size)) for at, size in zip(sums.offsets, sums.sizes, strict=True)]
            chunks[name] = [[at, size, xxhash.xxh3_64_hexdigest(data[at : at + size])] for at, size in places]
        directory.replace(".metadata", _metadata(state, rows))
        directory.replace(STATE, to_json(state.values))
        for each in directory.names():
            if each == "layout.json" or each.endswith(".sums"):
                directory.remove(each)
        files = {
            name: FileRecord(len(data), xxhash.xxh3_128_hexdigest(data), chunks.get(name, []))
            for name in directory.names()
            if name != "manifest.json"
            for data in [directory.read(name)]
        }
        directory.replace("manifest.json", Manifest(dict(info), files, 1).encode())
        assert read_manifest(directory).format == 1
    index = target / "checkpoints.json"
    os.remove(index)
    catalog = Catalog(LocalStorage(target))
    catalog.write_index(catalog.summaries())


def _metadata(state: StoredState, rows: Any) -> bytes:
    layout = state._contents.layout
    cuts: dict[int, int] = {}
    for tensor in layout.tensors.values():
        cuts.setdefault(id(tensor.cut), len(cuts))
    distinct = {id(tensor.cut): tensor.cut for tensor in layout.tensors.values()}
    places = [
        (int(rows[int(shard)].offsets[row]), int(rows[int(shard)].sizes[row]))
        for name, tensor in layout.tensors.items()
        for shard, row in zip(tensor.cut.shards, layout.rows[name], strict=True)
    ]
    offsets, sizes = np.array(places, np.int64).T
    table = [(name, each.dtype, each.shape, cuts[id(each.cut)]) for name, each in layout.tensors.items()]
    cut_parts = [(cut.boxes, cut.shards) for cut in distinct.values()]
    return encode(MetadataParts(table, cut_parts, state._contents.files, offsets, sizes))
