"""areal-ray chaos: an experiment under real faults in a seeded order, and what must be true of it afterwards."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from areal_ray.config import Config, ConfigError, load
from areal_ray.tools.chaos import faults, machine, unreadable
from areal_ray.tools.chaos.checks import check
from areal_ray.tools.chaos.kinds import KINDS, Kind, library, look_around, possible, survived
from areal_ray.tools.chaos.machines import impossible
from areal_ray.tools.chaos.network import NETWORK_KINDS, Network
from areal_ray.tools.chaos.world import World
from areal_ray.tools.verify_resume import Check

_PAUSE_S = (2.0, 10.0)  # of undisturbed training between recovery and the next fault


@dataclass(frozen=True)
class Injected:
    """A fault that happened: what, when (seconds since the epoch), and how long until the next finished step."""

    kind: str
    time: float
    recovery_s: float


def chaos(
    path: str,
    overrides: Sequence[str],
    folder: Path,
    minutes: float,
    seed: int,
    only: Sequence[str] = (),
    storage_process: int | None = None,
    machines: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[list[Injected], list[Check]]:
    """Disturb an experiment for some minutes, stop it, run it undisturbed as far, and compare.

    Args:
        path, overrides: the experiment; its storage may be elsewhere than `folder`, but not with machines.
        folder: an empty directory for the runs and their logs.
        minutes: of disturbed training.
        seed: of order, targets and moments of the faults.
        only: kinds of faults; all that are possible if none is named.
        storage_process: of the storage server, on this machine, to be stopped now and then.
        machines: give each worker, and the driver, a machine of its own in a network namespace, and disturb what is
            between them.
        say: prints a line for the user.

    Returns:
        The faults, and the checks (verify.Check) of what was promised.

    Raises:
        ConfigError: if the experiment is wrong.
        RuntimeError: if a kind of fault is unknown, or not possible here; or machines are not.
        NotSurvived: if the run did not come back after a fault.
    """
    given = load(path, overrides)
    if given.cluster.use_gpu:
        raise ConfigError("cluster.use_gpu", "chaos starts nodes of its own, on this machine, with CPUs only")
    if machines and _elsewhere(overrides):
        text = "with --machines is below --folder: nothing else is seen by all machines and by chaos itself"
        raise ConfigError("run.storage_path", text)
    workers = given.usable_sizes[-1]
    here = look_around(workers, not _elsewhere(overrides), storage_process)
    table = NETWORK_KINDS if machines else KINDS
    if machines and (lacks := impossible()):
        raise RuntimeError(f"no machines here: {lacks}")
    kinds, lacking = possible(table, here, only)
    for kind, lacks in lacking.items() if not only else ():
        say(f"not here: {kind} (needs {lacks})")
    folder.mkdir(parents=True, exist_ok=True)
    draw, injected = random.Random(seed), list[Injected]()
    checks: list[Check] = []
    with ExitStack() as stack:
        if here.mounts and not machines:
            machine.private_mounts()
        disk = faults.small_disk(folder / "disk", stack) if here.disk and not machines else None
        if disk:  # it is gone with the block, and what was lost on it could not be looked into
            stack.callback(lambda: None if _kept(checks) else shutil.copytree(disk, folder / "runs"))
        all_overrides = [*overrides, *_own(overrides, given, disk or folder / "runs")]
        config = load(path, all_overrides)
        world = (Network if machines else World)(path, all_overrides, folder, config, storage_process, disk)
        if any(table[kind].lacks is library for kind in kinds):
            world.refuse = unreadable.install(folder)
        stack.enter_context(world)
        world.start_driver()
        world.until("the first checkpoint", world.newest)
        _disturb(world, {kind: table[kind] for kind in kinds}, draw, minutes, injected, say)
        world.until("a checkpoint", world.newest)
        checks = check(world, world.end_driver(), path, overrides, folder, workers)
    return injected, checks


def _own(overrides: Sequence[str], given: Config, storage: Path) -> list[str]:
    """Overrides that make a run of the experiment one that can be disturbed for as long as one likes."""
    return [
        *([] if _elsewhere(overrides) else [f"run.storage_path={storage}"]),
        "run.name=chaos",
        "train.steps=1000000",
        "logging.sample_ids=true",
        *("on_end=null", "export=null", "eval.early_stopping=null"),
        f"cluster.num_workers={given.usable_sizes[-1]}",
        "checkpoint.max_failed_saves=100",  # faults of the storage last longer than three saves of a small run
        *([] if given.checkpoint.keep.last else ["checkpoint.keep.last=3"]),
    ]


def _disturb(
    world: World,
    kinds: Mapping[str, Kind],
    draw: random.Random,
    minutes: float,
    injected: list[Injected],
    say: Callable[[str], None],
) -> None:
    """Inject one fault after the other, all kinds in turn, each when the run has gone on after the one before."""
    deck: list[str] = []
    began = time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        time.sleep(draw.uniform(*_PAUSE_S))
        deck = deck or draw.sample(list(kinds), len(kinds))
        kind = deck.pop()
        hits = world.hits
        kinds[kind].inject(world, draw)
        # Some take a while to find their moment; to some there is more after the hit, while the run is back already.
        at = time.time() if kinds[kind].quiet else world.hit_at
        if world.hits == hits:
            say(f"{time.monotonic() - began:6.0f} s  {kind:<34} nobody was there")
            continue
        world.until(f"a step after: {kind}", lambda: survived(kinds[kind], world, at))  # noqa: B023  (called here)
        injected.append(Injected(kind, at, time.time() - at))
        say(f"{time.monotonic() - began:6.0f} s  {kind:<34} back after {injected[-1].recovery_s:5.1f} s")


def _kept(checks: Sequence[Check]) -> bool:
    """Whether all that was promised was found, if one came so far as to look."""
    return bool(checks) and all(check.kept for check in checks)


def _elsewhere(overrides: Sequence[str]) -> bool:
    return any(text.startswith("run.storage_path=") for text in overrides)
