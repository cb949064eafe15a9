"""Checks whether a fork of the fork server can take the place of a process, and what the fork takes over from it."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Names of variables that are read when a library is loaded or imported.
_AT_IMPORT = re.compile(r"(LD|GLIBC|MALLOC|OMP|MKL|OPENBLAS|KMP|GOMP|HF|TRANSFORMERS|TORCH|PYTORCH|CUDA|TRITON)_")
_MAY_DIFFER = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"}  # set again in each process
_SAY_S = 60.0
_OF_ACTORS = ("RAY_TRAIN_", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")  # read when they run


class RefusedPeers:
    """Counts connections that are refused, and says so at once, but not more often than once a minute."""

    def __init__(self) -> None:
        self._count, self._next, self._last = 0, 0.0, ""

    def add(self, reason: Exception) -> None:
        self._count, self._last = self._count + 1, str(reason)
        if time.monotonic() >= self._next:
            self.say()

    def say(self) -> None:
        """Say what has not been said; to be called at the end."""
        if self._count:
            print(f"fork server: {self._count} connections refused, the last: {self._last}", file=sys.stderr)
            self._count, self._next = 0, time.monotonic() + _SAY_S


def of_ray(environment: dict[str, str]) -> dict[str, str]:
    """Variables that Ray reads when it is imported; without those of single actors (Ray Train's, and trainer.py's)."""
    ours = {name: value for name, value in environment.items() if name.startswith("RAY_")}
    return {name: value for name, value in ours.items() if not name.startswith(_OF_ACTORS)}


def at_import(environment: dict[str, str]) -> dict[str, str]:
    """Variables that a library reads when it is loaded or imported."""
    return {k: v for k, v in environment.items() if _AT_IMPORT.match(k) and k not in _MAY_DIFFER}


def differing(one: dict[str, str], other: dict[str, str]) -> str:
    """Names of the variables that are not the same in both, for the screen: values may be secret."""
    return ", ".join(sorted(name for name in {*one, *other} if one.get(name) != other.get(name)))


def within(limits: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a process with its own limits of resources (soft, hard; -1 is none) may set these."""
    return all(own[kind][1] == -1 or 0 <= limits[kind][1] <= own[kind][1] for kind in own)


def python_path(environment: dict[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def base_path() -> list[str]:
    """The module path of this process without what its environment adds, and without this package."""
    added = {str(Path(__file__).resolve().parents[2]), *python_path(dict(os.environ))}
    return [path for path in sys.path if path not in added]


def inherit(request: dict[str, Any]) -> bool:
    """Take over from a request what a process has from its parent: this process has another one. Whether it could."""
    try:
        os.chdir(request["folder"])
        os.umask(request["umask"])
        os.sched_setaffinity(0, request["cores"])
        for kind, limits in request["limits"].items():
            resource.setrlimit(int(kind), tuple(limits))
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    except (OSError, ValueError) as error:
        print(f"a fork cannot do as it is told: {error}", file=sys.stderr)
        return False
    return True
