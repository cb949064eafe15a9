"""FSDP2 under torchrun, after PyTorch's tutorials on FSDP2, DCP and fault-tolerant training with torchrun.

torchrun --standalone --nproc-per-node 2 --max-restarts N -m tests.bench.peers.torchrun_fsdp2 WORK SAVE; SAVE is none
(and then nothing is loaded either) or one of savers.MODES. Optimizer, clipping and fused kernels are those of
areal_ray, so that with `none` it is the limit of what the loop could reach.
"""

import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from tests.bench.peers import savers
from tests.bench.peers.common import StepLog, Text, Work, build_model, endless, loss_of


def newest(storage: Path) -> Path | None:
    """The last checkpoint that is complete: DCP writes .metadata at the end."""
    done = [path for path in storage.glob("step-*") if (path / ".metadata").exists() or (path / savers.FULL).exists()]
    return max(done, default=None)


def main(path: str, save: str) -> None:
    work = Work.read(path)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    log = StepLog(work.log, rank)
    model = build_model(work)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    saver = savers.MODES[save](model, optimizer) if save != "none" else None

    first = 0
    if saver is not None:
        found = [newest(work.storage)]
        dist.broadcast_object_list(found)  # what rank 0 sees
        if found[0] is not None:
            first = savers.load(str(found[0]), model, optimizer)

    text = Text(work.seq_len)
    sampler = DistributedSampler(text, shuffle=True)
    loader = DataLoader(text, batch_size=work.rows, sampler=sampler, drop_last=True)
    length = work.every or work.steps
    for epoch in range(first, -(-work.steps // length)):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(islice(endless(loader), length)):
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if saver is not None:
                saver.fence()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            log.step(epoch * length + i + 1)
        if saver is not None:
            saver.save(str(work.storage / f"step-{(epoch + 1) * length:08d}"), epoch + 1)
            log.note("saved")
    if saver is not None:
        saver.settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
