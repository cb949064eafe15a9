"""Cases: what is changed, and what is asked of the product then. Each is a function of a generator of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random

import torch

from areal_ray.checkpoint import Catalog, StoredState
from areal_ray.cli.main import main
from areal_ray.run import RunDir
from areal_ray.run.goodput import goodput, table
from areal_ray.run.lease import hold_lease
from areal_ray.storage import LocalStorage
from tests.fuzz import mutations
from tests.fuzz.mending import mend, seal, without_limit, write
from tests.fuzz.seeds import STEPS, Seeds, blank
from tests.fuzz.state import contents, restore_run
from tests.fuzz.verdicts import (
    FORGED,
    GOOD,
    OLDER,
    RIGHT,
    TRACEBACK,
    WRONG,
    Bad,
    Errors,
    Verdict,
    of_command,
    of_error,
)

OLD, NEW = (Catalog.name(step, 1) for step in STEPS)
_FILLS = (0xA5, 0x5A)
_LOGS = ("events.jsonl", "metrics.jsonl", "samples.jsonl", "events.index.json", "driver.json", "result.json")
_TOOLS = ("ls", "verify", "inspect", "digest", "diff", "export")
_OVERRIDES = [
    "run.name=mine", "run.seed=1", "train.steps=10", "optim.lr=1e-3", "cluster.num_workers=[1,2]", "model=tiny",
    "data.paths=[a,b]", "cluster.env={A: b}", "checkpoint.keep.last=3", "engine.mesh.shard=2", "optim.betas=[0.9,0.95]",
    "run.s3.secret_key=abc", "cluster.watchdog=null", "checkpoint.every=auto", "data.source=text", "trackers=[]",
    "optim.groups=[{pattern: bias, lr: 0.1}]", "faults=[{kind: crash, step: 3}]", "run.storage_path=/tmp/x",
    "train.bad_step.spike_factor=3", "data=stdlib", "model.config.hidden_size=64", "objective.args={a: 1}",
]  # fmt: skip


def damaged(seeds: Seeds, kind: str, folder: Path, draw: Random) -> Verdict:
    """Bytes change after they were written: nothing but the saved states may come back."""
    run = _linked(seeds, kind, folder)
    name = draw.choice((NEW, NEW, NEW, OLD))
    file = draw.choice(sorted(os.listdir(run / name)))
    before = (run / name / file).read_bytes()
    what = draw.randrange(10)
    if what == 0:
        after = draw.choice(sorted((run / OLD).iterdir())).read_bytes()
        write(run / name / file, after)
    elif what == 1:
        after = None
        (run / name / file).unlink()
    else:
        after = draw.choice(mutations.BLIND)(before, draw)
        write(run / name / file, after)
    verdict = _restored(seeds, kind, run, draw, None)
    if verdict.what not in (RIGHT, OLDER):
        raise Bad(WRONG if verdict.what == FORGED else TRACEBACK, f"{name}/{file}: {verdict.text}")
    told = _tool(draw, run, name)
    if told.what == RIGHT and after != before and file != "manifest.json":
        digest = told.text.strip()
        if len(digest) == 64 and digest != seeds.digests[kind][name]:
            raise Bad(WRONG, f"the digest of {name} is another one after a change of {file}")
        if digest.startswith("good"):
            raise Bad(WRONG, f"verify calls {name} good after a change of {file}")
    return verdict


_AWARE: dict[str, mutations.Mutation] = {
    ".metadata": mutations.opcodes,
    "layout.json": mutations.tree,
    "state.json": mutations.tree,
    "manifest.json": mutations.tree,
}


def forged(seeds: Seeds, kind: str, folder: Path, draw: Random) -> Verdict:
    """All checksums are right, and what they are of is nonsense: an error of one line, or what stands there, whole."""
    run = _linked(seeds, kind, folder)
    files = sorted(os.listdir(run / NEW))
    file = draw.choice([*files, "manifest.json", ".metadata" if kind == "format-1" else "layout.json"])
    aware = _AWARE.get(file, mutations.words if file.endswith(".sums") else mutations.flip)
    mutation = aware if draw.randrange(6) else draw.choice(mutations.BLIND)
    after = mutation((run / NEW / file).read_bytes(), draw)
    with without_limit():
        if file == "manifest.json":
            _seal(run / NEW, after)
        else:
            write(run / NEW / file, after)
            mend(run / NEW, file)
    verdict = _restored(seeds, kind, run, draw, file)
    _tool(draw, run, NEW)
    return verdict


def index(seeds: Seeds, kind: str, folder: Path, draw: Random) -> Verdict:
    """The list of checkpoints, which has no checksum and on which nothing may depend."""
    run = _linked(seeds, kind, folder)
    path = run / "checkpoints.json"
    write(path, draw.choice([mutations.tree, mutations.tree, *mutations.BLIND])(path.read_bytes(), draw))
    told = _command(["ckpt", "ls", str(run)], "areal-ray ckpt: ")
    if told.what != RIGHT:
        raise Bad(TRACEBACK, told.text)
    return _must(RIGHT, _restored(seeds, kind, run, draw, None))


def logs(seeds: Seeds, kind: str, folder: Path, draw: Random) -> Verdict:
    """Events, metrics, samples, index, result and lease: no line of them blocks a restore."""
    run = _linked(seeds, kind, folder)
    path = run / draw.choice(_LOGS)
    aware = mutations.lines_of_json if path.suffix == ".jsonl" else mutations.tree
    write(path, draw.choice([aware] * 8 + mutations.BLIND)(path.read_bytes(), draw))
    here = RunDir(LocalStorage(run))
    asked: list[Callable[[], object]] = [
        here.result,
        here.metrics,
        here.samples,
        here.events,
        lambda: table(goodput(here)),
        lambda: _hold(here.storage),
    ]
    for ask in draw.sample(asked, 2):
        try:
            ask()
        except Exception as error:  # noqa: BLE001  (judged)
            verdict = of_error(error)
            raise Bad(verdict.what if verdict.what not in GOOD else TRACEBACK, f"{path.name}: {verdict.text}") from None
    return _must(RIGHT, _restored(seeds, kind, run, draw, None))


def _hold(run: LocalStorage) -> None:
    with hold_lease(run, lambda: None, lambda _: None, renew_s=0.01, expires_s=0.02, settle_s=0.0):
        return


def config(seeds: Seeds, kind: str, folder: Path, draw: Random) -> Verdict:
    """Files and overrides: a config that reads back as it prints, or one line."""
    conf = folder / "conf"
    shutil.copytree(seeds.folder / "conf", conf)
    overrides: list[str] = []
    if draw.randrange(2):
        path = draw.choice(sorted(conf.rglob("*.yaml")))
        mutation = draw.choice([mutations.yaml_text] * 3 + [draw.choice(mutations.BLIND)])
        path.write_bytes(mutation(path.read_bytes(), draw))
        if path.parent.name in ("model", "data"):
            overrides.append(f"{path.parent.name}={path.stem}")
    else:
        overrides = mutations.override(_OVERRIDES, draw)
    arguments = ["train", "--print-config", "--config", str(conf / "experiments/tiny.yaml"), "--"]
    told = _command([*arguments, *overrides], "config error: ")
    if told.what != RIGHT:
        return told if told.what in GOOD else _raise(told, f"{overrides}: ")
    again = conf / "experiments/again.yaml"
    again.write_text(told.text)
    second = _command(["train", "--print-config", "--config", str(again)], "config error: ")
    if second != told:
        raise Bad(WRONG, f"{overrides}: reads back as another one: {_first_difference(told.text, second.text)}")
    return Verdict(RIGHT)


def _first_difference(a: str, b: str) -> str:
    pairs = zip(a.splitlines(), b.splitlines(), strict=False)
    return str(next(((x, y) for x, y in pairs if x != y), b[:200]))


CASES: dict[str, tuple[int, Callable[[Seeds, str, Path, Random], Verdict], str]] = {  # how often, what, which seed
    "format 2, damaged": (3, damaged, "format-2"),
    "format 2, forged": (6, forged, "format-2"),
    "format 1, damaged": (1, damaged, "format-1"),
    "format 1, forged": (4, forged, "format-1"),
    "list of checkpoints": (1, index, "format-2"),
    "logs": (2, logs, "format-2"),
    "config": (1, config, ""),
}


def run(seeds: Seeds, seed: int, number: int, only: list[str], folder: Path) -> tuple[str, Verdict]:
    """Run a case.

    Args:
        seeds: to begin with.
        seed, number: of the case.
        only: kinds to choose from.
        folder: that is not there yet; it is removed again.

    Returns:
        The kind and the verdict.
    """
    draw = Random(f"{seed}/{number}")
    (kind,) = draw.choices(only, [CASES[each][0] for each in only])
    _, case, of = CASES[kind]
    folder.mkdir(parents=True)
    try:
        return kind, case(seeds, of, folder, draw)
    except Bad as bad:
        return kind, bad.verdict
    except Exception as error:  # noqa: BLE001  (judged)
        return kind, of_error(error)
    finally:
        shutil.rmtree(folder)


def _linked(seeds: Seeds, kind: str, folder: Path) -> Path:
    """A copy of a run directory. Files of checkpoints are links: the product never changes one in place."""
    run = folder / "run"
    run.mkdir()
    for entry in (seeds.folder / kind).iterdir():
        if entry.is_dir():
            shutil.copytree(entry, run / entry.name, copy_function=os.link)
        else:
            shutil.copyfile(entry, run / entry.name)
    return run


def _seal(directory: Path, after: bytes) -> None:
    try:
        body = json.loads(after)
    except ValueError:
        write(directory / "manifest.json", after)
        return
    seal(directory, body)


def _restored(seeds: Seeds, kind: str, run: Path, draw: Random, changed: str | None) -> Verdict:
    """Restore as a start of the workers does, and compare what is there then.

    Args:
        changed: the file that was forged; None: nothing but what was saved may come back.
    """
    job, said = blank(_FILLS[0]), list[str]()
    try:
        restore_run(run, job, said)
    except Exception as error:  # noqa: BLE001  (judged)
        return of_error(error)
    if long := [line for line in said if line.startswith("passing over") and "\n" in line]:
        raise Bad(TRACEBACK, f"more than a line: {long[0]!r}")
    found = contents(job)
    known = {RIGHT: seeds.states[kind][NEW], OLDER: seeds.states[kind][OLD]}
    for what, state in known.items():
        if repr(found) == repr(state):
            return Verdict(what)
    text = f"neither of the two states; said: {said}"
    if changed is None:
        raise Bad(WRONG, text)
    tensors = seeds.states[kind][NEW][0]
    if changed in ("state.json", "manifest.json") and found[0] != tensors:
        raise Bad(WRONG, f"tensors of another state; said: {said}")
    again = blank(_FILLS[1])
    restore_run(run, again, said)
    if repr(contents(again)) != repr(found):
        raise Bad(WRONG, f"parts are as they were before the restore; said: {said}")
    stored = StoredState(LocalStorage(run / NEW))
    whole = {name.removeprefix("engine."): tensor for name, tensor in stored.tensors(stored.names)}
    for name, bits in found[0].items():
        if whole[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes() != bits:
            raise Bad(WRONG, f"{name} is read by the tools as another one")
    return Verdict(FORGED)


def _tool(draw: Random, run: Path, name: str) -> Verdict:
    """One of the commands on the run, or a checkpoint of it."""
    tool, path = draw.choice(_TOOLS), str(run / name)
    arguments = {"ls": [str(run)], "diff": [path, str(run / OLD)], "export": [path, str(run.parent / "out")]}
    flags = ["--json"] if draw.randrange(3) == 0 and tool not in ("digest", "verify") else []
    verdict = _command(["ckpt", tool, *arguments.get(tool, [path]), *flags], "areal-ray ckpt: ")
    return verdict if verdict.what in GOOD else _raise(verdict, f"ckpt {tool}: ")


def _command(arguments: list[str], prefix: str) -> Verdict:
    out, errors = StringIO(), Errors()
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            status = main(arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (judged)
        return Verdict(TRACEBACK, f"{' '.join(arguments[:3])}: {of_error(error).text}")
    return of_command(status, out.getvalue(), errors, prefix)


def _raise(verdict: Verdict, text: str) -> Verdict:
    raise Bad(verdict.what, text + verdict.text)


def _must(what: str, verdict: Verdict) -> Verdict:
    if verdict.what == what:
        return verdict
    return _raise(Verdict(verdict.what if verdict.what not in GOOD else WRONG, verdict.text), "")
