"""areal-ray ckpt: the commands about checkpoints and their output."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from areal_ray.storage import Storage


def add_ckpt(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, paths, text in (
        ("ls", _ls, ["RUN"], "the checkpoints of a run directory"),
        ("inspect", _inspect, ["CKPT"], "what a checkpoint holds and where it comes from"),
        ("verify", _verify, ["CKPT"], "read every byte and compare it with the manifest"),
        ("digest", _digest, ["CKPT"], "one SHA-256 of the logical state, the same for any number of ranks"),
        ("gc", _gc, ["RUN"], "delete what saves that were never finished have left"),
        ("repair", _repair, ["RUN"], "make Ray's list of checkpoints anew from the manifests"),
        ("export", _export, ["CKPT", "OUT"], "write a Hugging Face directory: config, tokenizer, safetensors"),
        ("diff", _diff, ["A", "B"], "compare two states bit for bit; exit 0 if and only if they are the same"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        for path in paths:
            command.add_argument("run_dir" if path == "RUN" else path.lower(), metavar=path)
        command.add_argument("--json", action="store_true", help="print JSON")
        if run is _export:
            command.add_argument("--shard-size", default="5GB", help="largest file, for example 200MB (default 5GB)")
            command.add_argument(
                "--tokenizer", help="as data.tokenizer; default that of the run, if it is bytes; or none"
            )
            command.add_argument("--merged", action="store_true", help="of an adapter: the model with it, not it alone")
            command.add_argument("--base", help="of a merged one: directory or hub name of the base")
            command.add_argument(
                "--base-adapter", metavar="DIR", help="of that base: the model.merge_adapter of the run"
            )
            command.add_argument("--ema", action="store_true", help="the averages of the weights (optim.ema)")
            command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default as it was saved")
            for role, what in (("bos", "begins a text"), ("eos", "ends it"), ("pad", "fills rows")):
                command.add_argument(
                    f"--{role}-token", metavar="TEXT", help=f"the token that {what}; default as trained"
                )
            command.add_argument(
                "--model-class", metavar="PACKAGE.MODULE:CLASS", help="of a factory's model; its code is run and copied"
            )
        command.set_defaults(run=lambda arguments, run=run: _ckpt(run, arguments))


def _ckpt(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    from areal_ray.checkpoint import CheckpointDamaged

    try:
        return run(arguments)
    except (CheckpointDamaged, ValueError, OSError) as error:
        print(f"areal-ray ckpt: {error}", file=sys.stderr)
        return 1


def _at(path: str) -> Storage:
    from areal_ray.storage import storage_at

    return _not_empty(storage_at(path))


def _not_empty(storage: Storage) -> Storage:
    if not storage.names():
        raise ValueError(f"{storage.location}: nothing there")
    return storage


def _ls(arguments: argparse.Namespace) -> int:
    from areal_ray.storage import storage_at
    from areal_ray.tools import checkpoints

    run = storage_at(arguments.run_dir)
    rows = checkpoints.listing(run)
    if not rows:
        _not_empty(run)
    if arguments.json:
        _print_json(rows)
        return 0
    print(f"{'name':<20} {'step':>8} {'ranks':>5} {'size':>10}  {'saved':<19}  state")
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.1f} MB"
        ranks, saved = row["world_size"] or "", row["saved"] or ""
        print(f"{row['name']:<20} {row['step']:>8} {ranks:>5} {size:>10}  {saved:<19}  {row['state']}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import checkpoints

    found = checkpoints.inspection(_at(arguments.ckpt))
    if arguments.json:
        _print_json(found)
        return 0
    for key, value in found["info"].items():
        print(f"{key:<12} {value if not isinstance(value, dict) else json.dumps(value)}")
    print(f"{'bytes':<12} {found['bytes']:,} in {len(found['files'])} files\n\nvalues")
    print("\n".join(f"  {line}" for line in json.dumps(found["values"], indent=2).splitlines()))
    print(f"\n{len(found['tensors'])} tensors")
    for name, (dtype, shape) in found["tensors"].items():
        print(f"  {name}  {dtype} {'x'.join(map(str, shape)) or 'scalar'}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import checkpoints

    size = checkpoints.check(_at(arguments.ckpt))
    print(json.dumps({"good": True, "bytes": size}) if arguments.json else f"good: {size:,} bytes read and compared")
    return 0


def _digest(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import checkpoints

    value = checkpoints.digest(_at(arguments.ckpt))
    print(json.dumps({"sha256": value}) if arguments.json else value)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from areal_ray.tools import checkpoints

    found = checkpoints.differences(_at(arguments.a), _at(arguments.b))
    if arguments.json:
        _print_json([vars(difference) for difference in found])
    elif not found:
        print("bit-identical")
    else:
        for difference in found:
            apart = "" if difference.max_abs is None else f", max |a-b| {difference.max_abs:.3g}"
            print(f"{difference.name}: {difference.what}{apart}")
    return 1 if found else 0


def _export(arguments: argparse.Namespace) -> int:
    from areal_ray.config import plugin
    from areal_ray.run import RunDir
    from areal_ray.storage import storage_at
    from areal_ray.tools.export import Form, TokenNames, export

    plugin.extend_path(["."])  # as for an experiment that lies here
    names = TokenNames(arguments.bos_token, arguments.eos_token, arguments.pad_token)
    size = _bytes(arguments.shard_size)
    how = {key: getattr(arguments, key) for key in ("merged", "base", "base_adapter", "ema")}
    form = Form(size, arguments.tokenizer, arguments.dtype, names, arguments.model_class)
    above = arguments.ckpt.rstrip("/").rpartition("/")[0] or "."
    places = _at(arguments.ckpt), storage_at(arguments.out)
    done = export(*places, form=form, run=RunDir(storage_at(above)), **how)
    if arguments.json:
        _print_json(vars(done))
    else:
        shards = sum(file.endswith(".safetensors") for file in done.files)
        print(f"{done.tensors} tensors, {done.total_bytes:,} bytes in {shards} safetensors file{'s' * (shards != 1)}")
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text, re.I)
    if match is None or not int(match[1]):
        raise ValueError(f"{text!r} is no size; for example 5GB or 200MB")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]


def _gc(arguments: argparse.Namespace) -> int:
    from areal_ray.checkpoint import Catalog
    from areal_ray.checkpoint.retention import remove
    from areal_ray.run import RunDir
    from areal_ray.train.journal import begun_saves

    run = _at(arguments.run_dir)
    catalog = Catalog(run)
    # The last attempt may be saving just now; only what came before it is surely nobody's.
    newest = RunDir(run).newest("attempt")
    latest = max(newest["attempt"] if newest else 0, catalog.last_attempt())
    found = catalog.unfinished(latest)
    begun = begun_saves(RunDir(run), found) if found else set[str]()
    names = [name for name in found if name in begun and remove(catalog, name)]
    others = [name for name in found if name not in begun]
    if arguments.json:
        print(json.dumps({"deleted": names, "left": others}))
    else:
        left = [f"left {name}: no save of this run began it" for name in others]
        print("\n".join([*(f"deleted {name}" for name in names), *left]) or "nothing to delete")
    return 0


def _repair(arguments: argparse.Namespace) -> int:
    from areal_ray.checkpoint.catalog import INDEX
    from areal_ray.run.directory import SNAPSHOT

    run = _at(arguments.run_dir)
    with suppress(FileNotFoundError):  # it may be what is wrong
        run.remove(INDEX)
    try:
        from areal_ray.controller.snapshot import rebuild
    except ImportError as error:  # there is no Ray here, or one with another list; it starts without a list as well
        with suppress(FileNotFoundError):
            run.remove(SNAPSHOT)
        text = f"removed {SNAPSHOT}, as it cannot be made anew with this Ray ({error}); a run starts without it"
        print(json.dumps({"removed": SNAPSHOT}) if arguments.json else text)
        return 0
    names = rebuild(run)
    print(json.dumps({"checkpoints": names}) if arguments.json else f"{len(names)} checkpoints: {', '.join(names)}")
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """Infinities and NaN, for which JSON has no word, as text."""
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_finite(below) for below in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
