"""A disk that is soon full, for real: a tmpfs of its own, and ballast on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


class SmallDisk:
    """A mounted file system.

    Args:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def leave(self, room: int) -> None:
        """Fill it up to `room` bytes."""
        with open(self._ballast, "ab") as file:
            file.write(bytes(max(0, self.free - room) // PAGE * PAGE))

    def make_room(self) -> None:
        """Take the ballast away."""
        self._ballast.unlink()


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A disk of that size at the new directory `path`, gone when the block is left; a test is skipped without one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "areal_ray_small_disk", str(path)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        pytest.skip(f"cannot mount a tmpfs, which takes root: {str(reason).strip()}")
    try:
        yield SmallDisk(path)
    finally:
        # Lazily: a process that still looks at it must not make it stay.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
