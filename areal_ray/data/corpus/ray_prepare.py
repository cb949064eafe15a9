"""Preparing a large corpus with Ray Data, on all nodes of a cluster. The only part of `data` that imports Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import ray.data

from areal_ray.data.corpus.shard import Advance, Group, Record, Work, prepare_group


def on_cluster(work: Work, groups: Sequence[Group], advance: Advance) -> list[Record]:
    """Prepare the groups in tasks of Ray Data, one CPU each; a lost node costs the groups that it had in work.

    Files are written where the corpus lies by the tasks themselves; only records travel. Memory: that of
    `prepare_group`, for every CPU.

    Raises:
        Exception: what a source or renderer has raised in a task, as it was.
    """
    shared, by_number = ray.put(work), {group.number: group for group in groups}

    def run(row: dict[str, Any]) -> dict[str, Any]:
        record = prepare_group(ray.get(shared), by_number[row["item"]], keep=True)
        return {"number": row["item"], "record": record.dump()}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    numbers = ray.data.from_items(list(by_number), override_num_blocks=len(groups))
    done = numbers.map(run, num_cpus=1)  # tried again, for ever, when a node or a process is lost
    records: dict[int, Record] = {}
    try:
        for row in done.iter_rows():
            record = Record.load(row["record"])
            records[row["number"]] = record
            tokens = sum(shard.tokens for shard in record.shards.values())
            advance(by_number[row["number"]].bytes, tokens)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    return [records[group.number] for group in groups]
