"""Simulated: what 64, 256 and 1,024 ranks of a 70B model compute, send and hold for a save and a restore.

The real code, with fake ranks: this process is one rank, then another, of a fake process group, whose tensors have no
memory, and makes by itself what the others would send. Not simulated: the network, storage, and the tensors' bytes.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from areal_ray import models
from areal_ray.checkpoint.described import LayoutFiles, Names
from areal_ray.checkpoint.format.contents import Contents
from areal_ray.checkpoint.format.layout import LAYOUT, Layout
from areal_ray.checkpoint.format.manifest import MANIFEST, STATE, FileRecord, Manifest
from areal_ray.checkpoint.format.shard_file import framed_size
from areal_ray.checkpoint.format.sums import shard_name
from areal_ray.checkpoint.parts import _blocks, _overlaps, _requests
from areal_ray.checkpoint.plan import Places, _Held, _signature, plan_all
from areal_ray.config import load
from areal_ray.distributed import mesh
from areal_ray.distributed.parallelize import parallelize
from areal_ray.processes.dcp_pickle import encode
from areal_ray.processes.file_writer import PIECE, sums_name, write_small
from areal_ray.storage import LocalStorage

from . import report
from .arms import EXPERIMENT
from .bounds import simulated
from .launch import ROOT
from .options import Options

LAYOUTS = {"64 ranks": (64, 1), "256 ranks": (256, 1), "1024 ranks": (1024, 1), "2 x 512 ranks": (1024, 2)}
T = TypeVar("T")


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a 70B Llama's weights and of AdamW's moments and counts of steps: 2,892 tensors."""
    hidden, small, wide, rows = 8192, 1024, 28672, 128256
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (small, hidden),
        "self_attn.v_proj": (small, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    weights: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for number in range(80):
        weights |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    weights |= {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}
    optimizer = {f"optim.{name}.{of}": shape for name, shape in weights.items() for of in ("exp_avg", "exp_avg_sq")}
    optimizer |= {f"optim.{name}.step": () for name in weights}
    return {**{f"model.{name}": shape for name, shape in weights.items()}, **optimizer}


def rows_of(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, int]:
    """First row and number of rows of a rank's part, as torch.chunk has it."""
    each = -(-shape[0] // ranks)
    start = min(rank * each, shape[0])
    return start, min(each, shape[0] - start)


def tensors_of(rank: int, ranks: int, replicas: int) -> dict[str, torch.Tensor]:
    """What a rank holds, without memory; makes this process that rank. Counts of steps are whole on every rank."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    mesh, shards = init_device_mesh("cpu", (replicas, ranks // replicas)), ranks // replicas
    found: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        if not shape:
            found[name] = torch.empty((), device="meta")
            continue
        part = torch.empty((rows_of(shape, rank % shards, shards)[1], *shape[1:]), device="meta")
        stride = torch.empty(shape, device="meta").stride()
        size, placements = torch.Size(shape), [Replicate(), Shard(0)]
        found[name] = DTensor.from_local(part, mesh, placements, run_check=False, shape=size, stride=stride)
    return found


def held_of(rank: int, shards: int, table: list[tuple[str, tuple[int, ...], str]]) -> _Held:
    """What `_Held.by_this_rank` gives for a rank; that it does is checked for one."""
    boxes: list[int] = []
    sizes = []
    for _, shape, _ in table:
        length = shape
        if shape:
            start, count = rows_of(shape, rank % shards, shards)
            length = count, *shape[1:]
            boxes += [start, *[0] * (len(shape) - 1), *length]
        sizes.append(framed_size(length, torch.float32))
    return _Held(table, np.array(boxes, np.int64), np.array(sizes, np.int64))


def spent(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the seconds of CPU."""
    before = time.process_time()
    result = work()
    return result, time.process_time() - before


def held_in_memory(work: Callable[[], object]) -> float:
    """The most bytes of Python and numpy at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sums_of(rank: int, sizes: list[int]) -> bytes:
    """A table as the file writer would have written it."""
    lines = [f"sums 1 {PIECE}"]
    lines += [" ".join([f"{size} 1000", *[f"{rank:016x}"] * -(-size // PIECE)]) for size in sizes]
    return "\n".join([*lines, ""]).encode()


def simulate(ranks: int, replicas: int) -> dict[str, float]:
    """All figures, by name."""
    figures: dict[str, float] = {}
    elsewhere, shards = 5, ranks // replicas
    mine = tensors_of(elsewhere, ranks, replicas)
    figures["tensors"] = len(mine)
    held, own_s = spent(lambda: _Held.by_this_rank(mine))
    packed, pack_s = spent(lambda: held.pack(held.digest))
    everybody = [held_of(rank, shards, held.table) for rank in range(ranks)]
    assert all(
        (a == b).all() for a, b in ((everybody[elsewhere].boxes, held.boxes), (everybody[elsewhere].sizes, held.sizes))
    )
    gathered = [each.pack(held.digest) for each in everybody]

    def on_rank_zero() -> Any:
        planned = plan_all([_Held.unpack(each, held.table) for each in gathered])
        return pickle.dumps(planned[0]), planned

    (scattered, (_, layout, places)), plan_s = spent(on_rank_zero)
    figures["first save, rank 0: planning, s"] = plan_s + own_s + pack_s
    figures["first save, other ranks: planning, s"] = own_s + pack_s
    figures["first save: KB a rank sends"] = len(packed) / 1e3
    figures["first save: MB rank 0 receives"] = sum(map(len, gathered)) / 1e6
    figures["first save: MB rank 0 sends"] = len(scattered) / 1e6
    figures["first save, rank 0: MB held for planning"] = held_in_memory(on_rank_zero) / 1e6
    names = Names({name: tuple(name.split(".", 2)) for name in layout.tensors}, {})
    index = LayoutFiles(layout, places, names)
    text, layout_s = spent(lambda: index.layout)
    parts, parts_s = spent(lambda: index.parts)
    data, encode_s = spent(lambda: encode(parts))
    figures["first save, rank 0: layout.json, s"] = layout_s + parts_s
    figures["layout.json, MB"] = len(text) / 1e6
    figures["first save, beside rank 0: .metadata, s"] = encode_s
    figures[".metadata, MB"] = len(data) / 1e6

    later, fits_s = spent(lambda: _signature(mine) == _signature(mine))
    assert later
    figures["later save, every rank: whether the plan fits, s"] = fits_s / 2
    record = {"size": 10**9, "xxh3_128": "0" * 32}
    files = [{shard_name(rank): record, sums_name(shard_name(rank)): record} for rank in range(ranks)]
    sent = [pickle.dumps(each) for each in files]

    def commit() -> bytes:
        records = {name: each for one in map(pickle.loads, sent) for name, each in one.items()}
        return Manifest({"step": 1}, {name: FileRecord(**each) for name, each in records.items()}).encode()

    manifest, commit_s = spent(commit)
    figures["later save: bytes a rank sends"] = len(sent[0])
    figures["later save, rank 0: commit, s"] = commit_s
    figures["manifest.json, MB"] = len(manifest) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        figures |= restore(Path(folder), layout, places, text, replicas)
    figures |= start(ranks, replicas)
    return figures


def restore(folder: Path, layout: Layout, places: Places, text: bytes, replicas: int) -> dict[str, float]:
    """A restore but for the bytes of tensors, at the same size and at half of it."""
    directory, ranks = LocalStorage(folder / "checkpoint"), layout.shards
    directory.make()
    records = {LAYOUT: write_small(directory, LAYOUT, text), STATE: write_small(directory, STATE, b"{}")}
    owners = np.concatenate([tensor.cut.shards for tensor in layout.tensors.values()])
    by_owner = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=ranks)
    for rank, sizes in enumerate(np.split(places.sizes[by_owner], np.cumsum(counts)[:-1])):
        name = shard_name(rank)
        records[name] = {"size": int(sizes.sum()), "xxh3_128": "0" * 32}
        records[sums_name(name)] = write_small(directory, sums_name(name), sums_of(rank, sizes.tolist()))
    directory.publish(MANIFEST, Manifest({}, {name: FileRecord(**each) for name, each in records.items()}).encode())
    sent, read_s = spent(lambda: Contents.read(directory))
    figures = {"restore, rank 0: reads, s": read_s, "restore: KB sent to a rank": sum(map(len, sent)) / 1e3}
    for label, count in (("", ranks), (" at half of the ranks", ranks // 2)):
        mine = tensors_of(count // 2, count, replicas)

        def prepare(mine: dict[str, torch.Tensor] = mine) -> int:
            contents = Contents.decode(sent)
            wanted = _overlaps(contents, mine)
            sums = contents.sums(directory, wanted)
            return sum(1 for number in wanted for _ in _requests(list(_blocks(wanted[number], sums[number]))))

        requests, prepare_s = spent(prepare)
        figures[f"restore{label}, every rank: metadata, s"] = prepare_s
        figures[f"restore{label}, every rank: MB of metadata"] = held_in_memory(prepare) / 1e6
        figures[f"restore{label}: requests of a rank"] = requests
    return figures


def start(ranks: int, replicas: int) -> dict[str, float]:
    """Build a 70B model without memory and lay it over all ranks, as a rank does at every start."""
    tensors_of(5, ranks, replicas)
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256}
    names = [f"model.config.{name}={size}" for name, size in sizes.items()]
    names.append(f"engine.mesh.replicate={replicas}")
    config = load(str(ROOT / EXPERIMENT), names)
    with patch.object(mesh, "connect"), warnings.catch_warnings(action="ignore"):  # there is nobody to connect to
        dims = mesh.ParallelDims.build(config.engine.mesh, torch.device("cpu"), 600)

    def build() -> None:
        module = models.build_model(config.model)
        units = models.shard_units(module, config.model.shard_units)
        parallelize(module, units, dims, config.engine)

    _, build_s = spent(build)
    return {"start, every rank: model without memory, sharded, s": build_s}


def run(options: Options) -> list[dict]:
    """Each size in a process of its own: memory and caches of one would count for the next."""
    found = {}
    for label, (ranks, replicas) in LAYOUTS.items():
        with tempfile.NamedTemporaryFile("r") as result:
            code = f"from {__name__} import main; main({ranks}, {replicas}, {result.name!r})"
            subprocess.run([sys.executable, "-c", code], check=True)
            found[label] = json.load(result)
    rows = {name: {label: [found[label][name]] for label in LAYOUTS} for name in found["64 ranks"]}
    return [report.show(simulated(name), "", row, "64 ranks", report.NEITHER) for name, row in rows.items()]


def main(ranks: int, replicas: int, path: str) -> None:
    Path(path).write_text(json.dumps(simulate(ranks, replicas)))
