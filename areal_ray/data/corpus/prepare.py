"""Preparing a corpus: sources to token files, committed whole.

Documents of about 64 MiB of sources make a group, whose files are a pure function of them (shard.py). So groups can be
prepared in any order by any number of processes, one that was interrupted is prepared again, and two jobs that prepare
the same corpus write the same bytes under the same names. `manifest.json` comes last: before it there is no corpus.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from areal_ray.data.corpus.manifest import SOURCES, SPLITS, Manifest, Shard, library_versions
from areal_ray.data.corpus.planning import Plan
from areal_ray.data.corpus.shard import Advance, Group, Record, Work, hold_back, prepare_group
from areal_ray.storage import Storage

_SAY_EVERY_S = 5.0
# Prepares the groups: `in_process`, `process_prepare.ProcessPool`, `driver.ray_prepare.on_cluster`.
MapGroups = Callable[[Work, Sequence[Group], Advance], list[Record]]


def is_prepared(storage: Storage) -> bool:
    """Whether there is a corpus."""
    try:
        Manifest.read(storage)
    except FileNotFoundError:
        return False
    return True


def in_process(work: Work, groups: Sequence[Group], advance: Advance) -> list[Record]:
    """Prepare the groups one after the other. A single one leaves no record: the manifest follows at once."""
    return [prepare_group(work, group, len(groups) > 1, advance) for group in groups]


def prepare(plan: Plan, map_groups: MapGroups, say: Callable[[str], None]) -> Manifest:
    """Prepare a corpus, or find that it is there.

    What an interrupted try has finished is used, after its checksums have been compared.

    Args:
        plan: what and where.
        map_groups: prepares the groups.
        say: told of progress every few seconds.

    Raises:
        ConfigError, ValueError: if a source cannot be read or rendered.
        OSError: if storage fails.
    """
    storage = plan.work.storage
    try:
        if is_prepared(storage):
            return Manifest.read(storage)
        storage.ensure()
        for note in plan.work.source.notes:
            say(note)
        records = map_groups(plan.work, plan.groups, Progress(plan.bytes, say))
        splits = _splits(plan, records)
        _check_there(storage, splits)
        manifest = _manifest(plan, records, splits)
        with storage.create_whole(SOURCES) as sink:
            for record in records:
                sink.write("".join(json.dumps(part) + "\n" for part in record.parts).encode())
        manifest.write(storage)
    except FileNotFoundError:
        if not is_prepared(storage):  # else another job was done first, and has cleared up
            raise
        manifest = Manifest.read(storage)
    _clear_up(storage, manifest)
    return manifest


def _check_there(storage: Storage, splits: dict[str, list[Shard]]) -> None:
    """Raise OSError if a file that was written, perhaps on another node, is not to be seen here."""
    sizes = storage.sizes()
    for shards in splits.values():
        for name, about in [item for shard in shards for item in shard.files.items()]:
            if sizes.get(name) != about["bytes"]:
                text = f"{storage.location}/{name} was written, but is not here with all of its {about['bytes']} bytes"
                raise OSError(f"{text}: data.prepared_path must be a path that every node sees, or s3://")


def _splits(plan: Plan, records: Sequence[Record]) -> dict[str, list[Shard]]:
    """The shards of each split. If nothing is held out the next document is; of an only one, a share."""
    shards = [dict(record.shards) for record in records]
    chosen = _to_hold_back(plan, records) if plan.work.held_out else None
    documents = sum(shard.documents for found in shards for shard in found.values())
    # A share of a pair of answers would be none.
    if chosen is not None and (documents > 1 or plan.settings.get("format") != "preference"):
        number, split, document = chosen
        share = plan.work.held_out if documents == 1 else None
        shards[number] = hold_back(plan.work, plan.groups[number], shards[number][split], document, share)
    return {split: [found[split] for found in shards if split in found] for split in SPLITS}


def _to_hold_back(plan: Plan, records: Sequence[Record]) -> tuple[int, str, int] | None:
    """Group, split and number of the only document that is to be held out, if hashes leave one of the splits empty."""
    free = [number for number in range(len(records)) if plan.groups[number].split is None]
    there = {split for record in records for split in record.shards}
    if there == {"train"}:
        least = [(found[0], n, found[1]) for n in free if (found := records[n].least) is not None]
        return (min(least)[1], "train", min(least)[2]) if least else None
    if there == {"held_out"}:
        return next(((n, "held_out", 0) for n in free if records[n].shards), None)
    return None


def _manifest(plan: Plan, records: Sequence[Record], splits: dict[str, list[Shard]]) -> Manifest:
    skipped: dict[str, int] = {}
    for record in records:
        for reason, count in record.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    sources = {
        "listing": plan.listing,
        "parts": sum(len(record.parts) for record in records),
        "bytes": plan.bytes,
        "documents": sum(part[3] for record in records for part in record.parts),
        "skipped": skipped,
    }
    work = plan.work
    return Manifest(plan.settings, work.renderer.fingerprint, work.dtype, sources, splits, library_versions())


_TEMPORARY = re.compile(r".+\.(?P<pid>\d+)\.[0-9a-f]+\.tmp")


def _clear_up(storage: Storage, manifest: Manifest) -> None:
    """Remove what was needed on the way, and what processes of this machine that were killed have left."""
    kept = set(manifest.files)
    for name in storage.names():
        if name in kept or name == SOURCES:
            continue
        dead = (left := _TEMPORARY.fullmatch(name)) is not None and _is_dead(name, int(left["pid"]))
        if dead or re.fullmatch(r"\d{5}(\.done|h?\..+\.(bin|idx))", name):
            with suppress(FileNotFoundError):  # by another job
                storage.remove(name)


def _is_dead(name: str, pid: int) -> bool:
    if f".{socket.gethostname()}.{pid}." not in name:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


class Progress:
    """Says how far preparing has come, every few seconds; nothing, if it is done within the first of them.

    Args:
        total: bytes of all sources.
        say: prints a line.
        clock: seconds.
    """

    def __init__(self, total: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._say, self._clock = total, say, clock
        self._bytes = self._tokens = 0
        self._began = self._said = clock()

    def __call__(self, read: int, tokens: int) -> None:
        self._bytes += read
        self._tokens += tokens
        now = self._clock()
        if now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        seconds = now - self._began
        left = max(0.0, seconds * (self._total / max(1, self._bytes) - 1))
        done = f"{self._bytes / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        self._say(f"preparing data: {done}, {self._tokens / seconds:,.0f} tokens/s, {_duration(left)} left")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
