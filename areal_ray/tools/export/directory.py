"""A checkpoint as a Hugging Face directory: config, tokenizer, sharded safetensors with an index.

In one process and with a few tensors in memory at a time, from any storage to any storage.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from areal_ray import models
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.reader import StoredState
from areal_ray.data import build_tokenizer
from areal_ray.models import conversion, hf_weights, safetensors_files
from areal_ray.models.lazy_tensor import Box, LazyTensor, part_of
from areal_ray.run import RunDir
from areal_ray.storage import Storage
from areal_ray.tools.export.card import model_card
from areal_ray.tools.export.own_code import write_code
from areal_ray.tools.export.tokens import TokenNames, generation_config, in_config, special_tokens
from areal_ray.tools.export_adapter import SavedAdapter
from areal_ray.tools.stored_weights import stored_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """The outcome of an export."""

    files: list[str]
    tensors: int
    total_bytes: int


@dataclass(frozen=True)
class Form:
    """The form of an export, apart from what the checkpoint says.

    Args:
        shard_bytes: largest file, unless one tensor is larger.
        tokenizer: as data.tokenizer of the config, "none" for none. Default that of the run if it is the one of bytes:
            what a checkpoint names is nothing to load from a hub or a path unasked.
        dtype: float32, bfloat16 or float16; None: as they were saved. Weights that transformers keeps in float32 stay.
        tokens: special tokens that differ from those of training.
        model_class: "package.module:Class" of a factory's model, a transformers PreTrainedModel; its code is run.
    """

    shard_bytes: int = 5 << 30
    tokenizer: str | None = None
    dtype: str | None = None
    tokens: TokenNames = field(default_factory=TokenNames)
    model_class: str | None = None


def export(
    checkpoint: Storage,
    out: Storage,
    shard_bytes: int = 5 << 30,
    tokenizer: str | None = None,
    merged: bool = False,
    base: str | None = None,
    adapter: models.Adapter | None = None,
    form: Form | None = None,
    run: RunDir | None = None,
    ema: bool = False,
    before_config: Callable[[], None] = lambda: None,
    base_adapter: str | None = None,
) -> Exported:
    """Write the weights of a checkpoint so that `AutoModelForCausalLM.from_pretrained` reads them, bit for bit.

    Beside them: config, tokenizer and generation config with the special tokens that the model was trained with, and
    a model card. Every byte of the weights is read and written once; nothing else grows with the model.

    Of a run with an adapter it is the adapter's directory, as peft reads it, or the model with the adapter merged.

    Args:
        checkpoint: a committed checkpoint.
        out: a directory with nothing in it.
        shard_bytes, tokenizer: as of `Form`; where that is given, they are left out. An adapter's directory has a
            tokenizer only if it is given.
        merged: of an adapter: into its base.
        base: of a merged one: directory or hub name of the base; None if it was drawn from the run's seed.
        adapter: a user's own, as the run had it; for lora it is made anew.
        form: what else there is to say; of an adapter alone only the tokenizer.
        run: with the losses and data of the model card; None: the card has what the checkpoint says.
        ema: write the averages of the weights.
        before_config: called before the config is written, which makes the directory a model; of an adapter before
            its weights are. What it raises leaves it none.
        base_adapter: directory of the adapter of peft that the base of a merged one has in it (model.merge_adapter).

    Raises:
        FileExistsError: if there is something in `out`.
        ValueError: if the checkpoint is not of a transformers model, or its tokenizer or base is not given or cannot be
            loaded, or it has no averages and they are asked for.
        CheckpointDamaged: if the bytes are not those that were written.
    """
    form = form or Form(shard_bytes, tokenizer)
    if out.names():
        raise FileExistsError(f"{out.location} is not empty")
    with read_lock(checkpoint):
        state = StoredState(checkpoint)
        info = state.manifest.info
        model, config, own_class = _model(info, form, checkpoint.location)
        has_adapter = "adapter" in info
        if (merged or base or base_adapter) and not has_adapter:
            raise ValueError(f"{checkpoint.location} has no adapter: it is exported without --merged and --base")
        saved = SavedAdapter(info, adapter) if has_adapter else None
        stored = stored_weights(state, ema)
        if saved is not None and not merged:
            out.ensure()
            if form.tokenizer not in (None, "none"):
                _write_tokenizer(out, build_tokenizer(form.tokenizer).transformers())
            before_config()
            tensors = saved.write(out, stored)
            return Exported(sorted(out.names()), len(tensors), sum(each.nbytes for each in tensors.values()))
        named = _tokenizer_of(info, form)
        if saved is not None:
            stored = saved.merged(stored, base, base_adapter)
        if own_class is not None:
            _check_names(model, stored, form.model_class)
        stored = _in_dtype(model, stored, form.dtype)
        out.ensure()
        serving = info.get("serving") or {}
        source = serving.get("generation") or {}
        tokens = None
        if named != "none":
            known = build_tokenizer(named)
            written = known.transformers()
            tokens = special_tokens(written, known, serving, source, form.tokens)
            fixed = (info.get("model") or {}).get("config") or {}
            config = in_config(config, tokens, fixed)
            _write_tokenizer(out, written)
        config = _for_older_readers(config, form.dtype)
        if own_class is not None:
            config = write_code(out, own_class, config)
        weights = conversion.to_files(model, stored)
        index = safetensors_files.write(out, weights, form.shard_bytes)
        card = model_card(info, state.values, config, weights, run)
    safetensors_files.write_index(out, index)
    out.replace("generation_config.json", _json(generation_config(tokens, config, source)))
    out.replace("README.md", card.encode(errors="replace"))
    before_config()
    out.replace("config.json", _json(config))  # last: without it nobody takes the directory for a model
    return Exported(sorted(out.names()), len(weights), index["metadata"]["total_size"])


def _model(info: Mapping[str, Any], form: Form, location: str) -> tuple[nn.Module, dict[str, Any], type[Any] | None]:
    """The model on the meta device, its config.json, and its class if that is one's own."""
    config = info.get("hf_config")
    if config:
        return models.build_saved(config), dict(config), None
    made = (info.get("serving") or {}).get("factory")
    if not made:
        raise ValueError(f"{location} does not say which transformers model it is of: it cannot be exported")
    values, named = dict(made["config"]), str(made["class"])
    if named.startswith("transformers.") and form.model_class is None:
        return models.build_saved(values), values, None
    if form.model_class is None:
        raise ValueError(
            f"the run's factory made a {named}, and code that a checkpoint names is not run unasked: "
            f"give --model-class {shlex.quote(named)}"
        )
    model = models.build_of_class(form.model_class, values, "--model-class")
    return model, {**values, "architectures": [type(model).__name__]}, type(model)


def _tokenizer_of(info: Mapping[str, Any], form: Form) -> str:
    named = str(info.get("tokenizer") or "none")
    if form.tokenizer is None and named not in ("bytes", "none"):
        raise ValueError(
            f"the run's tokenizer was {named!r}, and what a checkpoint names is not loaded unasked: "
            f"give --tokenizer {shlex.quote(named)}, or --tokenizer none"
        )
    return form.tokenizer or named


def _check_names(model: nn.Module, stored: Mapping[str, torch.Tensor], named: str | None) -> None:
    wanted = hf_weights.weights_of(model)
    for name in sorted({*wanted, *stored}):
        here, there = wanted.get(name), stored.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if each is None else tuple(each.shape) for each in (here, there)]
            raise ValueError(f"{named} is another model than the checkpoint's: {name} is {shapes[0]} and {shapes[1]}")


def _in_dtype(model: nn.Module, stored: Mapping[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """The weights in another precision, each part when it is read."""
    if dtype is None:
        return dict(stored)
    kept: list[str] = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    kept += [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    wanted = DTYPES[dtype]

    def cast(name: str, source: torch.Tensor) -> torch.Tensor:
        if not source.dtype.is_floating_point or any(re.search(rf"\b{re.escape(part)}\b", name) for part in kept):
            return source

        def read(box: Box) -> torch.Tensor:
            part = part_of(source, box)
            found = part.to(wanted)
            if not torch.equal(found.isfinite(), part.isfinite()):
                raise ValueError(f"{name} has values that {dtype} has not: bfloat16 has the range of float32")
            return found

        return LazyTensor(source.shape, wanted, read)

    return {name: cast(name, tensor) for name, tensor in stored.items()}


def _for_older_readers(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json with what transformers 5 has renamed under its former names as well.

    vLLM, llama.cpp's converter and lm-eval come with versions of transformers that read those, and take a default if
    they find none: without rope_theta a model would run, and talk nonsense.
    """
    found = dict(config)
    if dtype is not None:
        found["dtype"] = dtype
    if "dtype" in found:
        found["torch_dtype"] = found["dtype"]
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        found.setdefault("rope_theta", rope["rope_theta"])
    return found


def _write_tokenizer(out: Storage, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(os.listdir(folder)):
            with open(os.path.join(folder, file), "rb") as stream:
                content = stream.read()
            if file == "tokenizer_config.json":
                values = json.loads(content)
                if values.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
                    values["tokenizer_class"] = "PreTrainedTokenizerFast"
                content = _json(values)
            out.replace(file, content)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n"
