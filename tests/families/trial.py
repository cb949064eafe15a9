"""A family's trial: two ranks beside what plain transformers does on one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from areal_ray.config import Config, ModelConfig, load
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.engine.objectives import LanguageModeling, next_token_loss
from areal_ray.models import attention_of
from tests.distributed.ranks import run_ranks
from tests.families.small import SEQ_LEN, VOCABULARY, small_config

_EXPERIMENT = str(Path(__file__).resolve().parents[2] / "conf/experiments/tiny.yaml")
_ROWS = 4


@dataclass(frozen=True)
class Trial:
    """What was seen of a family.

    Args:
        model_type: of transformers.
        attention: that the model was given.
        loaded: the logits from the saved directory are those of transformers, bit for bit.
        step: largest difference of the loss, with logits and without, and of any gradient, between two ranks and one.
        without_logits: whether the loss can be computed so.
        saved: transformers reads the engine's directory without a word, and computes the engine's logits, bit for bit.
        generated: and goes on with a text from it.
        from_config: built from its configuration, it trains.
        error: what went wrong instead.
    """

    model_type: str
    attention: str = ""
    loaded: bool = False
    step: float = float("inf")
    without_logits: bool = False
    saved: bool = False
    generated: bool = False
    from_config: bool = False
    error: str = ""

    @property
    def fine(self) -> bool:
        return self.loaded and self.saved and self.generated and self.from_config and self.step <= 1e-5


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(1, VOCABULARY, (_ROWS, SEQ_LEN), generator=generator)}


def part(rank: int) -> dict[str, torch.Tensor]:
    """A rank's rows of it: as many as a micro-batch has."""
    return {name: tensor[rank::2] for name, tensor in batch().items()}


def try_families(names: Sequence[str], root: str) -> list[Trial]:
    """One trial after the other, on two ranks in processes of their own."""
    ranks = run_ranks(_try_all, 2, root, list(names), time_limit_s=580)
    return [_of_both(Trial(**first), Trial(**second)) for first, second in zip(*ranks, strict=True)]


def _of_both(first: Trial, second: Trial) -> Trial:
    step, error = max(first.step, second.step), first.error or second.error
    return replace(first, loaded=first.loaded and second.loaded, step=step, error=error)


def _try_all(rank: int, root: str, names: list[str]) -> list[dict[str, Any]]:
    """What is plain transformers is shared by the ranks. A collective."""
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names[rank::2]:  # before there is a group, as in one transformers saves on the first rank only
        _attempt(lambda name=name: _reference(name, Path(root, name)), Path(root, name))
    dist.init_process_group("gloo")
    dist.barrier()
    found = []
    for name in names:
        error = Path(root, name, "error")
        if error.exists():
            found.append(Trial(name, error=error.read_text()))
            continue
        try:
            found.append(_trial(rank, name, Path(root, name)))
        except Exception as wrong:  # noqa: BLE001  (the next family is tried all the same)
            found.append(Trial(name, error=_words(wrong)))
    return [asdict(trial) for trial in found]


def _attempt(work: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        work()
    except Exception as wrong:  # noqa: BLE001  (see above)
        (folder / "error").write_text(f"transformers: {_words(wrong)}")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _reference(name: str, folder: Path) -> None:
    """The family's directory, and what transformers does with it on one rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = small_config(name)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)  # norms and biases too: every weight counts
    made.save_pretrained(folder / "given", max_shard_size="50KB")
    model = AutoModelForCausalLM.from_pretrained(folder / "given", dtype=torch.float32)
    with torch.no_grad():
        logits = [model.eval()(**part(rank), use_cache=False).logits for rank in range(2)]
    loss = next_token_loss(model.train()(**batch(), use_cache=False).logits, batch())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"logits": logits, "loss": loss.detach(), "gradients": gradients}, folder / "reference.pt")


def _trial(rank: int, name: str, folder: Path) -> Trial:
    reference = torch.load(folder / "reference.pt")
    engine = _start(ModelConfig(path=str(folder / "given")))
    mine = part(rank)
    loaded = torch.equal(engine.forward(mine), reference["logits"][rank])
    without_logits = engine._sharded.needs_logits is None
    losses = []
    if without_logits:
        engine.loss = "chunked"
        losses.append(engine.evaluate(mine, LanguageModeling()).loss)
        engine.loss = "logits"
    losses.append(engine.forward_backward(mine, LanguageModeling()).loss)
    step = max(abs(float(loss - reference["loss"])) for loss in losses)
    for key, parameter in engine.model.named_parameters():
        if (want := reference["gradients"].get(key)) is not None:
            assert isinstance(parameter.grad, DTensor), f"{key} has no gradient"
            step = max(step, float((parameter.grad.full_tensor() - want).abs().max()))
    engine.optimizer_step()
    engine.lr_scheduler_step()
    engine.save(SaveLoadMeta(str(folder / "saved"), "hf", with_optim=False))
    now = engine.forward(mine)
    saved, generated, error = True, True, ""
    if rank == 0:  # alone: what goes wrong must not leave the other waiting
        try:
            saved, generated = _read_by_transformers(folder / "saved", mine, now)
        except Exception as wrong:  # noqa: BLE001  (see `_try_all`)
            saved, generated, error = False, False, _words(wrong)
    attention = attention_of(engine.model) or ""
    engine.destroy()
    try:
        again = _start(ModelConfig(config=small_config(name)))
        from_config = math.isfinite(again.forward_backward(mine, LanguageModeling()).loss)
        again.destroy()
    except ValueError as wrong:  # on both
        from_config, error = False, error or _words(wrong)
    return Trial(name, attention, loaded, step, without_logits, saved, generated, from_config, error)


def _read_by_transformers(folder: Path, rows: dict[str, torch.Tensor], logits: torch.Tensor) -> tuple[bool, bool]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    words = [key for key, value in info.items() if value]
    with torch.no_grad():
        same = torch.equal(model.eval()(**rows, use_cache=False).logits, logits)
        ids = model.generate(rows["input_ids"][:, :4], max_new_tokens=2, do_sample=False, eos_token_id=None)
    if words:
        raise ValueError(f"transformers says {json.dumps({word: sorted(map(str, info[word])) for word in words})}")
    return same, ids.shape[1] == 6


def _start(model: ModelConfig) -> FSDPEngine:
    sizes = [f"train.seq_len={SEQ_LEN}", f"train.global_batch_size={_ROWS}", "train.micro_batch_size=2"]
    config: Config = replace(load(_EXPERIMENT, [*sizes, "cluster.collective_timeout_s=60"]), model=model)
    engine = FSDPEngine(config, device="cpu")
    engine.initialize()
    return engine
