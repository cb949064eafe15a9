"""Limits of a machine that a run comes upon: open files, and memory that processes share."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator

from areal_ray.run.units import size_text
from areal_ray.tools.doctor.finding import Finding

OPEN_FILES, SHARED_MEMORY = "open files", "/dev/shm"
_FILES = 4096
_GIB = 1 << 30


def limits() -> Iterator[Finding]:
    """What this machine allows, one after the other."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files[1] == resource.RLIM_INFINITY or files[1] >= _FILES
    text = f"{files[0]:,} at a time, and up to {files[1]:,}" + ("" if enough else f": raise it to {_FILES}, ulimit -n")
    yield Finding("ok" if enough else "bad", OPEN_FILES, text)
    if os.path.isdir(SHARED_MEMORY):
        free = shutil.disk_usage(SHARED_MEMORY).free
        slow = ": Ray's object store falls back to a slow disk. Delete what is left there, or give the container more"
        text = f"{size_text(free)} free" + ("" if free > _GIB else f"{slow} (docker run --shm-size=8g)")
        yield Finding("ok" if free > _GIB else "note", SHARED_MEMORY, text)
