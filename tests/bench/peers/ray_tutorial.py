"""Ray's own tutorial "Get started with PyTorch FSDP2 and Ray Train", on this model and on CPU.

python -m tests.bench.peers.ray_tutorial WORK UPLOAD; UPLOAD is sync, as the tutorial has it, or async: Ray's
asynchronous upload, as its guide to checkpoints shows; or best: that, and a fused optimizer.
"""

import os
import sys
import tempfile
from itertools import islice

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"

import ray.train
import ray.train.torch
import torch
import torch.distributed.checkpoint as dcp
from ray.train import CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Adam
from torch.utils.data import DataLoader

from tests.bench.peers.common import StepLog, Text, Work, build_model, endless, loss_of
from tests.bench.peers.savers import AppState


def shard_model(model: torch.nn.Module) -> None:
    mesh = init_device_mesh("cpu", (ray.train.get_context().get_world_size(),), mesh_dim_names=("data_parallel",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def load_fsdp_checkpoint(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint) -> int:
    with checkpoint.as_directory() as folder:
        app_state = AppState(model, optimizer)
        dcp.load({"app": app_state}, checkpoint_id=folder)
    return app_state.epoch


def report_and_save(model, optimizer, metrics: dict, epoch: int, upload: str) -> None:
    if upload != "sync":
        folder = tempfile.mkdtemp()
        dcp.save({"app": AppState(model, optimizer, epoch)}, checkpoint_id=folder)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"app": AppState(model, optimizer, epoch)}, checkpoint_id=folder)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def train_func(config: dict) -> None:
    work = Work(**config["work"])
    log = StepLog(work.log, ray.train.get_context().get_world_rank())
    model = build_model(work)
    shard_model(model)
    optimizer = Adam(model.parameters(), lr=work.lr, fused=config["upload"] == "best")

    start_epoch = 0
    loaded_checkpoint = ray.train.get_checkpoint()
    if loaded_checkpoint:
        start_epoch = load_fsdp_checkpoint(model, optimizer, loaded_checkpoint) + 1

    loader = DataLoader(Text(work.seq_len), batch_size=work.rows, shuffle=True, drop_last=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    length = work.every or work.steps
    for epoch in range(start_epoch, -(-work.steps // length)):
        if ray.train.get_context().get_world_size() > 1:
            loader.sampler.set_epoch(epoch)
        running_loss = 0.0
        for i, batch in enumerate(islice(endless(loader), length)):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            log.step(epoch * length + i + 1)
        if work.every:
            report_and_save(model, optimizer, {"loss": running_loss / length}, epoch, config["upload"])
            log.note("saved")


def main(path: str, upload: str) -> None:
    work = Work.read(path)
    workers = work.workers if isinstance(work.workers, int) else tuple(work.workers)
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"work": vars(work), "upload": upload},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="tutorial", storage_path=str(work.storage), failure_config=FailureConfig(max_failures=-1)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
