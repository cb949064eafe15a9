"""Hugging Face Trainer under Ray's TorchTrainer, after Ray's guide "Get Started with Hugging Face Transformers".

python -m tests.bench.peers.hf_trainer WORK. Accelerate (1.15) shards on accelerators only (state.py takes FSDP for
MULTI_GPU and its like, not for MULTI_CPU): with GPUs this is FSDP2 with sharded checkpoints, on CPU plain DDP, where
every rank holds everything and one saves.
"""

import os
import sys
from pathlib import Path

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.bench.peers.common import StepLog, Text, Work, build_model


class Labelled(Text):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = super().__getitem__(index)["input_ids"]
        return {"input_ids": ids, "labels": ids}


class Steps(TrainerCallback):
    def __init__(self, log: StepLog) -> None:
        self._log = log

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._log.step(state.global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        self._log.note("saved")


def train_func(config: dict) -> None:
    work = Work(**config["work"])
    log = StepLog(work.log, ray.train.get_context().get_world_rank())
    on_gpu = torch.cuda.is_available()
    sharded = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    }
    arguments = TrainingArguments(
        output_dir=str(Path(work.folder, "hf")),
        per_device_train_batch_size=work.rows,
        max_steps=work.steps,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        save_strategy="steps" if work.every else "no",
        save_steps=work.every or 500,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        **(sharded if on_gpu else {}),
    )
    trainer = Trainer(model=build_model(work), args=arguments, train_dataset=Labelled(work.seq_len))
    trainer.add_callback(RayTrainReportCallback())
    trainer.add_callback(Steps(log))
    trainer = prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
        return
    with checkpoint.as_directory() as folder:
        trainer.train(resume_from_checkpoint=os.path.join(folder, RayTrainReportCallback.CHECKPOINT_NAME))


def main(path: str) -> None:
    work, on_gpu = Work.read(path), torch.cuda.is_available()
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"work": vars(work)},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=work.workers, use_gpu=on_gpu),
        run_config=RunConfig(name="hf", storage_path=str(work.storage), failure_config=FailureConfig(max_failures=-1)),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
