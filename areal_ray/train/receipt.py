"""Receipt of a restore: the state that was saved beside the one that is there now; an error if they disagree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from areal_ray.config import Config

# What a run that goes on from a checkpoint promises to have in common with one that was not disturbed.
SAME_BITS = "the same bits"
SAME_STEPS = "the same samples, learning rates and steps; weights to rounding"
# Where a run lives, how it ends and what goes wrong on purpose do not make it another one.
_PASSING = (
    "run.name",
    "run.storage_path",
    "run.s3",
    "run.recover",
    "run.allow_changes",
    "train.stop_at",
    "on_end",
    "faults",
)


@dataclass(frozen=True)
class Receipt:
    """Position of a run in its checkpoint and after the restore.

    Args:
        before, now: step, samples, epoch, lr, optimizer_step, global_batch, world_size, mesh.
        changed: [before, now] by key of the config, for the keys that differ.
        promise: SAME_BITS, or SAME_STEPS where sums are taken in another order: after a change of the mesh, of the
            device, of torch, of engine.accumulate or model.loss, and on GPUs without engine.deterministic.
    """

    before: dict[str, Any]
    now: dict[str, Any]
    changed: dict[str, list[Any]]
    promise: str

    def event(self) -> dict[str, Any]:
        """Fields for the event log."""
        return {"before": self.before, "now": self.now, "changed": self.changed, "promise": self.promise}

    def text(self) -> str:
        """Lines for the console: every value once, both where they differ."""
        shown = [f"{name.replace('_', ' ')} {self._both(name)}" for name in self.now]
        lines = ["  " + ", ".join(shown)]
        lines += [f"  changed: {key} {before} -> {now}" for key, (before, now) in self.changed.items()]
        lines += [f"  from here on: {self.promise}"] if self.promise != SAME_BITS else []
        return "\n".join(lines)

    def _both(self, name: str) -> str:
        before, now = _brief(self.before.get(name)), _brief(self.now[name])
        return now if before == now else f"{before} -> {now}"


def receipt(
    saved: Mapping[str, Any], saved_info: Mapping[str, Any], live: Mapping[str, Any], live_info: Mapping[str, Any]
) -> Receipt:
    """Compares a checkpoint with the objects that were restored from it.

    Args:
        saved, live: plain values of the state, by object, as in state.json: progress, data, engine.
        saved_info, live_info: world_size, mesh and the redacted config, as in the manifest.

    Raises:
        ValueError: if step, optimizer step and cursor contradict each other, or differ from the saved ones.
    """
    before, now = _position(saved, saved_info), _position(live, live_info)
    for where, place in (("the checkpoint", before), ("the restored run", now)):
        if place["optimizer_step"] != place["step"]:
            raise ValueError(f"{where} is at step {place['step']}, but its optimizer at step {place['optimizer_step']}")
    for where, values in (("the checkpoint", saved), ("the restored run", live)):
        if values["data"]["next_sample"] != values["progress"]["samples"]:
            raise ValueError(
                f"{where} has trained on {values['progress']['samples']} samples, but its cursor is at "
                f"{values['data']['next_sample']}"
            )
    for name in ("step", "samples"):
        if before[name] != now[name]:
            raise ValueError(f"the checkpoint is at {name} {before[name]}, the restored run at {now[name]}")
    old, new = _settings(saved_info), _settings(live_info)
    keys = sorted(key for key in {*old, *new} if not key.startswith(_PASSING))
    # A key that the version which saved did not know had its default.
    was = {key: old.get(key, _DEFAULTS.get(key)) for key in keys}
    changed = {key: [was[key], new.get(key)] for key in keys if old and was[key] != new.get(key)}
    return Receipt(before, now, changed, _promise(saved_info, live_info, new))


def _promise(saved: Mapping[str, Any], live: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    here = {**live, "torch": live.get("versions", {}).get("torch")}
    there = {**saved, "torch": saved.get("versions", {}).get("torch")}
    # What an older checkpoint does not say is taken to have been the same.
    names = ("world_size", "mesh", "device", "torch")
    same_order = all(there.get(name) in (None, here.get(name)) for name in names)
    same_order &= _chosen(saved) == _chosen(live)
    fixed_order = not config.get("cluster.use_gpu") or config.get("engine.deterministic")
    return SAME_BITS if same_order and fixed_order else SAME_STEPS


def _settings(info: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration by key, with what `auto` was taken for; empty if the manifest has none."""
    flat = _flat(info.get("config") or {})
    return {**flat, **_chosen(info)} if flat else {}


def _chosen(info: Mapping[str, Any]) -> dict[str, str]:
    """What `auto` was taken for, or the one way of versions that do not say."""
    return {
        "engine.accumulate": str(info.get("accumulate", "unsharded")),
        "model.loss": str(info.get("loss", "logits")),
    }


def _position(values: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    schedule = values["engine"]["schedule"]
    return {
        "step": values["progress"]["step"],
        "samples": values["progress"]["samples"],
        "epoch": values["data"].get("epoch"),
        "lr": schedule.get("lr"),
        "optimizer_step": schedule["step"],
        "global_batch": _settings(info).get("train.global_batch_size"),
        "world_size": info.get("world_size"),
        "mesh": info.get("mesh"),
        **values["data"].get("sources", {}),  # what a data set says of its parts
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


_DEFAULTS = _flat(asdict(Config()))


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return " x ".join(f"{name} {size}" for name, size in value.items())
    return str(value)
