"""Deaths of workers while a checkpoint was being restored, from the ledger's events.

Nothing reads bytes that are not verified, and still a restore can end a process: in a library, or for lack of memory.
Started again it would end the same way, for ever. So rank 0 writes down `restoring` before a load and `restored` after
it, Ray's controller `restore_died` for a death in between, and a checkpoint with LIMIT of them is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LIMIT = 3


def given_up(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Checkpoints in whose restore workers have died LIMIT times in a row, and how often.

    Since the run was submitted: that it is submitted again may mean that there is more memory now.

    Args:
        events: the turning points of the ledger.
    """
    died: dict[str, int] = {}
    for event in events:
        if event["event"] == "submitted":
            died = {}
        elif event["event"] == "restore_died" and event["times"] >= LIMIT:
            died[event["checkpoint"]] = event["times"]
    return died


def times_in_a_row(events: Sequence[dict[str, Any]], checkpoint: str) -> int:
    """Count the deaths in the restore of a checkpoint since anything was restored, or the run submitted.

    Args:
        events: the turning points of the ledger.
        checkpoint: its name.
    """
    times = 0
    for event in events:
        if event["event"] in ("submitted", "restored", "started"):
            times = 0
        elif event["event"] == "restore_died" and event["checkpoint"] == checkpoint:
            times += 1
    return times


def being_restored(events: Sequence[dict[str, Any]], after: int) -> dict[str, Any] | None:
    """The `restoring` event of the newest attempt, if it restores still and nothing is known to hang.

    Args:
        events: the turning points of the ledger.
        after: an attempt up to this number has ended before.
    """
    newest = {event["event"]: event for event in events}
    restoring, attempt = newest.get("restoring"), newest.get("attempt")
    if restoring is None or attempt is None or restoring["attempt"] != attempt["attempt"]:
        return None
    if attempt["attempt"] <= after:
        return None
    done = [newest[kind] for kind in ("restored", "started", "training", "stuck") if kind in newest]
    return None if any(event.get("attempt") == attempt["attempt"] for event in done) else restoring
