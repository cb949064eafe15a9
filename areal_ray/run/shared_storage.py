"""Whether all nodes have one and the same storage: each reads what the others write."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from areal_ray.storage import Storage

TOKEN = "submission"  # file with the token of the newest submission, in the run directory
_LOOK_S, _PATIENCE_S = 0.5, 10.0  # NFS may answer from what it knew some seconds ago
_NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)


class NotShared(ValueError):
    """A node's run.storage_path is not the storage that the others see; the message names node and path."""


def leave_token(run: Storage, token: str) -> None:
    """Write what every rank is to find; the driver calls it before the workers start (OSError)."""
    run.replace(TOKEN, token.encode())


class SharedStorage:
    """The run directory, as seen from one node.

    Args:
        run: the run directory.
        token: unique to this submission.
        node: name of this node, for messages.
        patience_s: so long a file that is not there is looked for again, in seconds.
    """

    def __init__(self, run: Storage, token: str, node: str, patience_s: float = _PATIENCE_S) -> None:
        self._run, self._token, self._node, self._patience_s = run, token, node, patience_s

    def find_token(self) -> None:
        """Find what the driver has written (NotShared, OSError): one small read."""
        self._find(TOKEN, "the driver wrote")

    def leave(self, number: int) -> None:
        """Write what the next node is to find (NotShared, OSError).

        Args:
            number: of this node.
        """
        try:
            self._run.replace(f"{TOKEN}.{number}", self._token.encode())
        except OSError as error:
            if not isinstance(error, _NOT_THERE) and error.errno != errno.EROFS:
                raise
            raise NotShared(f"{self._node} cannot write to {self._run.location}: {error.strerror}") from None

    def find(self, number: int) -> None:
        """Find what the node of that number has left, and remove it (NotShared, OSError)."""
        name = f"{TOKEN}.{number}"
        self._find(name, f"node {number} of this start wrote")
        self._run.remove(name)

    def _find(self, name: str, what: str) -> None:
        until = time.monotonic() + self._patience_s
        while not self._is_there(name):
            if time.monotonic() > until:
                raise NotShared(
                    f"{self._node} does not see what {what} to {self._run.location}: run.storage_path must be storage "
                    "that all nodes share, mounted at the same path, or s3://"
                )
            time.sleep(min(_LOOK_S, self._patience_s))

    def _is_there(self, name: str) -> bool:
        try:
            return self._run.read(name) == self._token.encode()
        except _NOT_THERE:
            return False


def agree(
    storage: SharedStorage,
    node: int,
    first: bool,
    all_or_raise: Callable[[Callable[[], None]], None],
    lowest: Callable[[int], int],
) -> None:
    """Show that all ranks have the driver's storage, and each other's. A collective.

    A rank reads one small file, and of every node one rank writes one and reads that of the node before; outcomes are
    one word each, whatever the number of ranks.

    Args:
        storage: as this rank sees it.
        node: number of this rank's node.
        first: whether this rank does the writing for its node.
        all_or_raise, lowest: those of `distributed.Ranks`.

    Raises:
        RankError: on all ranks, of NotShared if it is not.
    """
    all_or_raise(storage.find_token)
    nodes = 1 - lowest(-node)
    if nodes > 1:
        all_or_raise(lambda: storage.leave(node) if first else None)
        all_or_raise(lambda: storage.find((node - 1) % nodes) if first else None)
