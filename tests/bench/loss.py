"""A step at a large vocabulary, with all logits at once and without: its memory, its speed, its loss and gradients.

Memory is the peak of the whole process (VmHWM, set back before the step) above its size just before, when weights and
optimizer are there already. malloc gives back to the system what is freed, as in the part `accumulate`.
"""

import ctypes
import time
from dataclasses import dataclass

import torch

from areal_ray.config import load
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import LanguageModeling

from ..distributed.ranks import run_ranks
from . import report
from .accumulate import M_MMAP_THRESHOLD, memory
from .options import Options

VOCABULARY, SEQ_LEN = 131072, 2048
ARMS = tuple(f"{weights}, {loss}" for weights in ("tied", "untied") for loss in ("logits", "chunked"))
MODEL = (
    f"model.config.vocab_size={VOCABULARY}",
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1024",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=4",
    "model.config.head_dim=64",
    f"model.config.max_position_embeddings={SEQ_LEN}",
    f"train.seq_len={SEQ_LEN}",
    "train.global_batch_size=1",
    "train.micro_batch_size=1",
    "cluster.num_workers=1",
)


@dataclass
class Step:
    """A step: GB beyond what was there, tokens per CPU second, its loss and some of its gradients."""

    peak: float
    rate: float
    loss: float
    gradients: dict[str, torch.Tensor]


def step(rank: int, name: str) -> Step:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    torch.set_num_threads(2)
    weights, loss = name.split(", ")
    tied = f"model.config.tie_word_embeddings={str(weights == 'tied').lower()}"
    engine = FSDPEngine(load("conf/experiments/tiny.yaml", [*MODEL, tied, f"model.loss={loss}"]), device="cpu")
    engine.initialize()
    batch = {"input_ids": torch.randint(0, VOCABULARY, (1, SEQ_LEN), generator=torch.Generator().manual_seed(0))}
    first = engine.forward_backward(batch, LanguageModeling())
    gradients = {key: p.grad.full_tensor()[:4096].clone() for key, p in engine.model.named_parameters()}
    engine.optimizer_step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, began = memory("VmRSS"), time.process_time()
    engine.forward_backward(batch, LanguageModeling())
    engine.optimizer_step()
    seconds = time.process_time() - began
    return Step((memory("VmHWM") - before) / 1e9, SEQ_LEN / seconds, float(first.loss), gradients)


def run(options: Options) -> list[dict]:
    names = [name for name in ARMS if not options.only or name in options.only]
    peaks: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        seen: dict[str, Step] = {}
        for name in options.order(names, number):
            (seen[name],) = run_ranks(step, 1, name)
            peaks[name].append(seen[name].peak)
            rates[name].append(seen[name].rate)
            report.said(name, f"{peaks[name][-1]:.2f} GB, {rates[name][-1]:.0f} tokens/s of CPU time")
        for weights in ("tied", "untied"):
            if {f"{weights}, logits", f"{weights}, chunked"} <= seen.keys():
                _compare(weights, seen[f"{weights}, logits"], seen[f"{weights}, chunked"])
    return [
        report.show("peak memory of a step at a large vocabulary", "GB", peaks, ARMS[0]),
        report.show("a step at a large vocabulary, by CPU time", "tokens/s", rates, ARMS[0], report.HIGHER),
    ]


def _compare(weights: str, logits: Step, chunked: Step) -> None:
    apart = max(float((logits.gradients[key] - chunked.gradients[key]).abs().max()) for key in logits.gradients)
    largest = max(float(gradient.abs().max()) for gradient in logits.gradients.values())
    text = f"losses {abs(logits.loss - chunked.loss):.1e} apart, gradients {apart:.1e}, the largest is {largest:.1e}"
    report.said(weights, text)
