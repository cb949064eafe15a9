"""Runs to the ends of other objectives than language modelling, cut, gone on elsewhere and come back."""

from __future__ import annotations

import ast
import fractions
import json
import mailbox
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray import models
from areal_ray.checkpoint import StoredState, load, save
from areal_ray.config import Config
from areal_ray.data import GlobalBatches, build_tokenizer
from areal_ray.data.answers import AnswerFile
from areal_ray.data.corpus import planning, prepare
from areal_ray.data.corpus.corpus import Corpus
from areal_ray.data.splits import open_splits
from areal_ray.distributed import Ranks
from areal_ray.engine import FrozenShards, FSDPEngine, LanguageModeling, hidden
from areal_ray.engine.objectives import build_objective
from areal_ray.engine.objectives.dpo import REFERENCE_LOG_PROBS
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import export
from areal_ray.train import answers
from tests.distributed.small import GLOBAL_BATCH, differing, small_config, snapshot

FIRST, SECOND, LAST = 1, 2, 4  # where runs are cut, and their end
SEQ_LEN = 128
KINDS = {
    "sft": ["objective={name: sft, args: {z_loss: 1.0e-3, label_smoothing: 0.05}}"],
    "dpo": ["objective={name: dpo, args: {beta: 0.5}}"],
    "distillation": ["objective={name: distillation, args: {teacher: ROOT/teacher, temperature: 2.0, share: 0.9}}"],
}
PAIRS = {"dpo"}


def write(root: Path) -> None:
    """Models as transformers writes them, records of docstrings with their bodies, and prepared corpora of these."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    for name, hidden_size, vocab_size in (("given", 32, 264), ("teacher", 48, 272)):
        torch.manual_seed(hidden_size)
        sizes |= {"hidden_size": hidden_size, "intermediate_size": 64, "vocab_size": vocab_size}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes))
        if name == "teacher":  # it has more to say than what is drawn usually
            torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        model.save_pretrained(root / name)
        build_tokenizer("bytes").save(str(root / name))
    said = [pair for module in (fractions, mailbox) for pair in _docstrings(Path(str(module.__file__)))]
    answers = [{"prompt": prompt, "completion": body} for prompt, body in said]
    pairs = [
        {"prompt": prompt, "chosen": body, "rejected": said[(i + 1) % len(said)][1]}
        for i, (prompt, body) in enumerate(said)
        if len(prompt) + len(said[(i + 1) % len(said)][1]) < SEQ_LEN
    ]
    for name, records in (("answers", answers), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind in KINDS:
        config = config_of(root, kind)
        plan = planning.make_plan(config.data, build_tokenizer("bytes"), LocalStorage(root / f"{kind} data"))
        prepare.prepare(plan, prepare.in_process, lambda _: None)
        (root / f"{kind}.corpus").write_text(plan.work.storage.location)


def _docstrings(path: Path) -> list[tuple[str, str]]:
    """Docstrings and what follows them, of functions that fit into a row."""
    source = path.read_text()
    lines, found = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and len(node.body) > 1:
            body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]) + "\n"
            prompt = f'def {node.name}():\n    """{doc}"""\n'
            if len(prompt) + len(body) < SEQ_LEN:
                found.append((prompt, body))
    return found


@cache
def config_of(root: Path | str, kind: str, *overrides: str) -> Config:
    name = "pairs" if kind in PAIRS else "answers"
    given = [text.replace("ROOT", str(root)) for text in KINDS[kind]]
    data = [f"data.paths=[{root}/{name}.jsonl]", f"data.format={'preference' if kind in PAIRS else 'completion'}"]
    return small_config(
        "model=pretrained",
        f"model.path={root}/given",
        "data.source=jsonl",
        "data.packing=none",
        "data.tokenizer=bytes",
        "data.held_out=0",
        *data,
        f"train.seq_len={SEQ_LEN}",
        f"train.steps={LAST}",
        "optim.lr=3e-3",
        "model.loss=chunked",
        *given,
        *overrides,
        sizes=False,
    )


class Run:
    """Engine, objective and data cursor of a kind, as a worker wires them."""

    def __init__(self, root: str, kind: str, *overrides: str, weights: bool = True) -> None:
        config = config_of(root, kind, *overrides)
        self.objective = build_objective(config.objective)
        self.engine = FSDPEngine(config)
        about = {"references": self.objective.references, "reference_models": self.objective.reference_models}
        self.engine.initialize(weights=weights, **about)  # type: ignore[arg-type]
        corpus = Corpus(LocalStorage(Path(root, f"{kind}.corpus").read_text()))
        self.rows, _ = open_splits(config.data, {"": corpus}, SEQ_LEN)
        self.batches = GlobalBatches(self.rows, 0, GLOBAL_BATCH, self.engine.dp_rank, self.engine.dp_size)
        self.state = {"engine": self.engine.state, "data": self.batches}
        self.steps: list[dict[str, float]] = []

    def train(self, last: int) -> Run:
        while self.engine.state.state_dict()["schedule"]["step"] < last:
            result = self.engine.forward_backward(next(self.batches), self.objective)
            self.engine.optimizer_step()
            self.engine.lr_scheduler_step()
            self.steps.append({name: float(value) for name, value in result.scalars().items()})
        return self

    def save(self, path: str) -> None:
        info = {"hf_config": models.architecture(self.engine._config.model), "tokenizer": "bytes"}
        save(LocalStorage(path), self.state, info | self.engine.describe(), Ranks())

    def load(self, path: str) -> Run:
        load(LocalStorage(path), self.state, Ranks())
        return self

    def first_gradients(self) -> dict[str, torch.Tensor]:
        """Loss and gradients of the first global batch."""
        result = self.engine.forward_backward(next(self.batches), self.objective)
        gradients = {
            name: p.grad.full_tensor() for name, p in self.engine.model.named_parameters() if p.grad is not None
        }
        return {"loss": result.loss, **gradients}

    def first_batch_again(self) -> dict[str, float]:
        """Loss and metrics of the global batch that the run began with."""
        self.batches.next_sample = 0
        result = self.engine.evaluate(next(self.batches), self.objective)
        return {"loss": float(result.loss), **{name: float(value) for name, value in result.metrics.items()}}


def two(rank: int, root: str) -> dict[str, Any]:
    """On two ranks: undisturbed, and cut at two steps; the first step also with logits, and on other meshes."""
    dist.init_process_group("gloo")  # one for all engines
    hidden.CHUNK_BYTES = 4 * 264 * 100
    seen: dict[str, Any] = {"own": own_reference(root)}
    for kind in KINDS:
        run = Run(root, kind)
        before = _frozen_bits(run)
        fresh = snapshot(run.engine)
        run.train(FIRST).save(f"{root}/{kind} first")
        run.train(LAST)
        undisturbed = snapshot(run.engine)
        run.save(f"{root}/{kind} last")
        again = Run(root, kind, weights=False).load(f"{root}/{kind} first").train(SECOND)
        again.save(f"{root}/{kind} second")
        resumed = Run(root, kind, weights=False).load(f"{root}/{kind} second").train(LAST)
        split = Run(root, kind, "engine.mesh.tensor=2", "model.loss=auto") if kind == "dpo" else None
        seen[kind] = {
            "steps": run.steps,
            "resumed steps": again.steps + resumed.steps,
            "differing": differing(snapshot(resumed.engine), undisturbed),
            "moved": len(differing(fresh, undisturbed, "model.")),
            "tensors": undisturbed,
            "chunked": Run(root, kind).first_gradients(),
            "logits": Run(root, kind, "model.loss=logits").first_gradients(),
            "split": split and split.first_gradients(),
            "after": run.first_gradients(),
            "first batch": run.first_batch_again(),
            "references": [each.engine.describe().get("references") for each in (run, resumed, split) if each],
            "frozen": [before, _frozen_bits(run)],
            "saved": StoredState(LocalStorage(f"{root}/{kind} last")).names,
        }
    run = Run(root, "sft").load(f"{root}/sft last")
    out = LocalStorage(f"{root}/exported")
    Ranks().on_rank_zero(lambda: export(LocalStorage(f"{root}/sft last"), out) and None)
    rows = {name: tensor for name, tensor in next(run.batches).items() if name in ("input_ids", "attention_mask")}
    seen["exported"] = rows, run.engine.forward(rows)
    return seen


def _frozen_bits(run: Run) -> list[str]:
    references: Mapping[str, Any] = run.engine._references
    return [models.fingerprint(reference._model.module) for reference in references.values()]


class Watching(LanguageModeling):
    """Language modelling that asks the model that is trained itself, as a frozen one, before each micro-batch."""

    model: Any

    def prepare(self, batch: dict[str, torch.Tensor], models: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        frozen = FrozenShards(self.model, chunked=True)
        said = frozen.log_probs(self.model_inputs(batch), batch["labels"])
        whole = frozen(self.model_inputs(batch)).log_softmax(-1)
        want = whole.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0] * (batch["labels"] != -100)
        torch.testing.assert_close(said, want, rtol=1e-4, atol=1e-5)
        return batch


def own_reference(root: str) -> list[str]:
    """Names of gradients that differ if the model serves as a frozen one between its own micro-batches."""
    plain, watched = Run(root, "sft"), Run(root, "sft")
    plain.objective, watched.objective = LanguageModeling(), Watching()
    watched.objective.model = watched.engine._sharded  # type: ignore[attr-defined]
    found = differing(plain.first_gradients(), watched.first_gradients())
    assert watched.engine.model.training
    return found


def one(rank: int, root: str) -> dict[str, Any]:
    """On one rank from the first cut to the second."""
    dist.init_process_group("gloo")
    seen: dict[str, Any] = {}
    for kind in KINDS:
        run = Run(root, kind, "cluster.num_workers=1", weights=False).load(f"{root}/{kind} first").train(SECOND)
        run.save(f"{root}/{kind} alone")
        seen[kind] = {"references": run.engine.describe().get("references"), "steps": run.steps}
    return seen


def back(rank: int, root: str) -> dict[str, Any]:
    """On two ranks again, to the end."""
    dist.init_process_group("gloo")
    return {
        kind: snapshot(Run(root, kind, weights=False).load(f"{root}/{kind} alone").train(LAST).engine) for kind in KINDS
    }


def asked(rank: int, root: str, place: str) -> dict[str, Any]:
    """The pairs of a data set, about which a frozen model is asked once; what was asked, and the run's steps with it.

    Pieces are of 4 rows. Beside this one a run that asks at every step.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    answers.PIECE = 4
    workers = f"cluster.num_workers={dist.get_world_size()}"
    once = "objective={name: dpo, args: {beta: 0.5, precompute: true}}"
    run = Run(root, "dpo", workers, once, "model.loss=logits")
    rows = {"train": run.rows, "held_out": run.rows, "set-other": run.rows}  # all the same
    found = answers.Answers(LocalStorage(place), run.objective, rows, Ranks(), {"precision": "float32"})
    seen: dict[str, Any] = {"nothing yet": found.find(run.engine.references) is None, "unknown": found.find({}) is None}
    calls: list[int] = []
    data = found.ask(run.engine, 3, lambda: calls.append(1), lambda _: None)["train"]
    seen["calls"], seen["rows"] = len(calls), len(data)
    seen["files"] = sorted(path.name for path in Path(place).rglob("*") if path.is_file())
    run.engine.release_references()
    run.batches = GlobalBatches(data, 0, GLOBAL_BATCH, run.engine.dp_rank, run.engine.dp_size)
    seen["steps"] = run.train(2).steps
    if dist.get_world_size() > 1 and len(calls) > 2:
        seen["plain"] = Run(root, "dpo", workers, "model.loss=logits").train(2).steps
    seen["values"] = torch.from_numpy(data[np.arange(len(data))][REFERENCE_LOG_PROBS])
    seen["fingerprints"] = [data.fingerprint, run.rows.fingerprint]
    return seen


def asked_again(rank: int, root: str, place: str) -> dict[str, Any]:
    """After a part of the answers was lost, and another torn."""
    dist.init_process_group("gloo")
    (folder,) = Path(place).iterdir()
    if rank == 0:
        whole = folder / f"train.{REFERENCE_LOG_PROBS}.bin"
        values = np.frombuffer(whole.read_bytes()[:-16], "<f4").reshape(-1, 2)
        whole.unlink()
        kept = AnswerFile(LocalStorage(folder), f"train.{REFERENCE_LOG_PROBS}", len(values), 4)
        for piece in kept.pieces[1:]:
            kept.write(piece, values[piece.start : piece.stop])
        torn = sorted(folder.glob("*.part"))[0]
        torn.write_bytes(torn.read_bytes()[:-3])
    dist.barrier()
    return asked(rank, root, place)


def with_adapter(rank: int, root: str) -> dict[str, Any]:
    """Pairs with LoRA: what the reference, which is the base, says before and after training, and beside a model."""
    dist.init_process_group("gloo")
    adapter = "adapter={name: lora, args: {r: 4, target_modules: all-linear}}"
    run = Run(root, "dpo", adapter)
    batch = {name: tensor[:3] for name, tensor in next(run.batches).items()}
    run.batches.next_sample = 0
    before = run.engine.ask(batch, run.objective)[REFERENCE_LOG_PROBS]
    run.train(FIRST).save(f"{root}/lora first")
    run.train(LAST)
    resumed = Run(root, "dpo", adapter, weights=False).load(f"{root}/lora first").train(LAST)
    model = Run(root, "dpo")
    return {
        "said": [
            before,
            run.engine.ask(batch, run.objective)[REFERENCE_LOG_PROBS],
            model.engine.ask(batch, model.objective)[REFERENCE_LOG_PROBS],
        ],
        "differing": differing(snapshot(run.engine), snapshot(resumed.engine)),
        "steps": [run.steps[FIRST:], resumed.steps],
        "references": [run.engine.references, resumed.engine.references],
    }
