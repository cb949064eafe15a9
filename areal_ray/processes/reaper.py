"""Ends process groups when this process has died, however it did."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

# End of file comes when nobody holds the other end of the pipe any more. A shell: it is small, and starts at once.
_SCRIPT = 'read ended || kill -s KILL -- "$@"'


class Reaper:
    """A process that waits for the end of this one, and then kills what it has left.

    A local Ray cluster ends with its driver, but for the raylet's agents: they try to report for a minute.

    Args:
        groups: ids of process groups.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        command = ["/bin/sh", "-c", _SCRIPT, "reaper", *(f"-{group}" for group in groups)]
        nowhere = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
        )

    def close(self) -> None:
        """Call it off: the groups have ended in good order."""
        self._process.communicate(b"ended\n")
