"""Preparing a large corpus with Ray Data, on all nodes of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.exceptions import RayTaskError

from areal_ray.data.corpus.shard import Advance, Group, Record, Work, prepare_group


def on_cluster(work: Work, groups: Sequence[Group], advance: Advance) -> list[Record]:
    """Prepare the groups in tasks of Ray Data, one CPU each; a lost node costs the groups that it had in work.

    Files are written where the corpus lies by the tasks themselves; only records travel. Memory: that of
    `prepare_group`, for every CPU. What a source or a renderer raises in a task is raised here; it is not tried again.
    """
    shared, by_number = ray.put(work), {group.number: group for group in groups}

    def run(row: dict[str, Any]) -> dict[str, Any]:
        record = prepare_group(ray.get(shared), by_number[row["item"]], keep=True)
        return {"number": row["item"], "record": record.dump()}

    records: dict[int, Record] = {}
    with _settings():
        numbers = ray.data.from_items(list(by_number), override_num_blocks=len(groups))
        done = numbers.map(run, num_cpus=1)  # tried again, for ever, when a node or a process is lost
        try:
            for row in done.iter_rows():
                record = records[row["number"]] = Record.load(row["record"])
                tokens = sum(shard.tokens for shard in record.shards.values())
                advance(by_number[row["number"]].bytes, tokens)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
    return [records[group.number] for group in groups]


@contextmanager
def _settings() -> Iterator[None]:
    """Without the bars and the plans of Ray Data, as `Progress` says how far it is; with errors as they were raised."""
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before, level = (context.enable_progress_bars, context.raise_original_map_exception), log.level
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.raise_original_map_exception = before
        log.setLevel(level)
