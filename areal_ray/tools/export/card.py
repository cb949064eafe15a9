"""The model card of an export: what it was trained on, how long, how well, and with which configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from areal_ray.data.corpus.corpus import Corpus
from areal_ray.run import RunDir
from areal_ray.storage import storage_at

_ROWS = 12  # of the table of losses
# Of the configuration, what says nothing about the model but something about whose machines it was trained on.
_PRIVATE = {
    "run": ("storage_path", "s3", "private"),
    "data": ("prepared_path",),
    "cluster": None,
    "trackers": None,
    "faults": None,
}


def model_card(
    info: Mapping[str, Any],
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    run: RunDir | None,
) -> str:
    """README.md of a Hugging Face directory.

    Args:
        info: of the checkpoint's manifest; an earlier version's may lack parts.
        values: plain values of its state.
        config: config.json.
        weights: as they are written.
        run: the run that it is of, if it is there: its losses and the sizes of its corpora are read.
    """
    settings = _table_of(info, "config")
    data, train = _table_of(settings, "data"), _table_of(settings, "train")
    source = _table_of(settings, "model").get("path")
    name = _table_of(settings, "run").get("name") or "model"
    kind = ", ".join(map(str, _list_of(config, "architectures"))) or str(config.get("model_type"))
    samples, length = _table_of(values, "progress").get("samples"), train.get("seq_len")
    tokens = samples * length if isinstance(samples, int) and isinstance(length, int) else 0
    facts = {
        "architecture": kind,
        "parameters": f"{sum(each.numel() for each in weights.values()):,}",
        "weights": ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in weights.values()})),
        "began with": source or ("seed " + str(info["seed"]) if "seed" in info else None),
        "steps": _of(info.get("step"), train.get("steps")),
        "tokens": f"{tokens:,}" if tokens else None,
        "sequences": f"{samples:,} of {length} tokens" if tokens else None,
        "objective": _table_of(settings, "objective").get("name"),
        "optimizer": _table_of(settings, "optim").get("name"),
        "tokenizer": info.get("tokenizer"),
        "workers": info.get("world_size"),
        "versions": ", ".join(f"{key} {value}" for key, value in _table_of(info, "versions").items()),
    }
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- areal_ray"]
    if isinstance(source, str) and source and not source.startswith(("/", ".", "~", "s3:")):
        head.append(f"base_model: {json.dumps(source)}")
    parts = [
        "\n".join([*head, "---"]),
        f"# {name}",
        _table(("", ""), ((key, value) for key, value in facts.items() if value not in (None, ""))),
        "## Data\n\n" + "\n".join(_data(data, run)),
        "## Losses\n\n" + _losses(info, run),
        "## Configuration\n\n```json\n" + json.dumps(_public(settings), indent=2, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _table_of(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of what a manifest says, which anybody may have written: the card does without what is of another kind."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _list_of(values: Mapping[str, Any], key: str) -> list[Any]:
    found = values.get(key)
    return list(found) if isinstance(found, list | tuple) else []


def _of(step: Any, steps: Any) -> str | None:
    return None if step is None else f"{step:,} of {steps:,}" if isinstance(steps, int) else f"{step:,}"


def _table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(each) for each in row)} |" for row in rows)])


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _data(data: Mapping[str, Any], run: RunDir | None) -> list[str]:
    """A line for each source, with the size of its corpus where that can be looked at."""
    sizes = _sizes(run)
    lines = []
    mixture: list[Mapping[str, Any]] = [each for each in _list_of(data, "mixture") if isinstance(each, dict)]
    sources = mixture or [data]
    for each in sources:
        name = str(each.get("name", ""))
        what = ", ".join(map(str, [each.get("source") or "", *_list_of(each, "paths")[:8]]))
        share = f", weight {each['weight']}" if "weight" in each else ""
        lines.append(
            f"- {f'{name}: ' if name else ''}{what} ({each.get('format', 'text')}{share}){sizes.get(name, '')}"
        )
    held_out = [each.get("held_out") for each in sources]
    return [*lines, f"- held out for evaluation: {', '.join(map(str, held_out))} of the documents"]


def _sizes(run: RunDir | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, noted in (run.data() or {} if run is not None else {}).items():
        with suppress(OSError, ValueError):  # gone, or of another kind: the card does without
            manifest = Corpus(storage_at(noted["path"])).manifest
            counts = f"{manifest.count('train', 'documents'):,} documents, {manifest.count('train', 'tokens'):,} tokens"
            found[name] = f": {counts} to train on"
    return found


def _losses(info: Mapping[str, Any], run: RunDir | None) -> str:
    """The results of the checkpoint, and some of the course until then."""
    here = {"step": info.get("step"), **_table_of(info, "metrics")}
    rows = [] if run is None else [line for line in run.sampled_metrics(_ROWS) if line["step"] <= (here["step"] or 0)]
    rows = [line for line in rows if any(_is_loss(key) for key in line)]
    rows = rows[:: max(1, -(-len(rows) // _ROWS))]
    rows = [*(line for line in rows if line["step"] != here["step"]), here]
    names = sorted({key for line in rows for key in line if _is_loss(key)}, key=lambda key: (key != "loss", key))
    body = ((line["step"], *(_number(line.get(name)) for name in names)) for line in rows)
    return _table(("step", *(name.replace("_", " ") for name in names)), body)


def _is_loss(key: str) -> bool:
    return key == "loss" or key.startswith("held_out")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, value in settings.items():
        private: tuple[str, ...] | None = _PRIVATE.get(section, ())
        if private is not None:
            found[section] = (
                {key: each for key, each in value.items() if key not in private} if isinstance(value, dict) else value
            )
    return found
