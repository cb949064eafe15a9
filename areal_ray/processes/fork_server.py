"""Processes that have imported everything when they begin: forks of one that has.

A process of a Ray job spends seconds on importing torch, transformers and Ray, and every process of the job on a node
does so once more. Here one process a node, the fork server, does it for all of them: the driver starts it when it
starts itself, and tells Ray (`py_executable` of the runtime environment) to run launch.py instead of the interpreter,
which asks the fork server for a fork. On other nodes launch.py starts the fork server with the job's first process.

Three things must not happen before the fork: open connections, CUDA, and the import of Ray before a process of the job
has shown its environment, because Ray's C++ part keeps some of it (job id, authentication). Threads do not live on in a
fork; OpenBLAS and jemalloc, whose imports start some, take care of that themselves.
A request that does not fit is refused, and becomes an ordinary process with all its imports.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict

from areal_ray.config import Config, ModelConfig, redact
from areal_ray.processes import launch

# Keys of a job's runtime environment that bring an interpreter of their own.
_EXECUTABLE = ("py_executable", "pip", "uv", "conda", "container", "image_uri", "nsight", "rocprof_sys")


def process_environment(config: Config) -> dict[str, str]:
    """Environment variables of all processes of a job that are read when libraries are loaded, or soon after.

    How glibc's malloc is to behave, and `cluster.env`. Training runs in a thread of Ray's, and a thread's own heap
    gives its memory back to the system and faults it in again, thousands of pages in every step; the first heap does
    not. With GPUs many threads allocate at once (pinned memory, NCCL, copies), and one heap would make them wait for
    each other. In huge pages it costs the processor fewer look-ups. See the GNU C library's manual, "Memory Allocation
    Tunables".

    A job without GPUs sees none, wherever it runs: torch's build for GPUs would ask CUDA for them on a machine without
    NVIDIA's driver, and after that no fork of the process could be used.
    """
    tunables = (
        ["glibc.malloc.hugetlb=1"] if config.cluster.use_gpu else ["glibc.malloc.arena_max=1", "glibc.malloc.hugetlb=1"]
    )
    own = {"GLIBC_TUNABLES": ":".join(tunables)}
    if (
        config.cluster.use_gpu
    ):  # NCCL's flight recorder, see distributed/flight_recorder.py: the older and the newer name
        own |= {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_FR_BUFFER_SIZE": "2000"}
    chosen = {name: os.environ.get(name, value) for name, value in own.items()}
    hidden = {} if config.cluster.use_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**chosen, **hidden, **config.cluster.env}


class ForkServer:
    """The fork server on this machine, as the driver sees it. To be closed.

    Args:
        model: whose classes are imported, too.
        preparation: module whose `prepare` and `import_ray` it calls before it forks.
        environment: variables beside this process's own, those of `process_environment`.
    """

    def __init__(self, model: ModelConfig, preparation: str, environment: Mapping[str, str]) -> None:
        self._name, self._preparation = secrets.token_hex(16), preparation
        self._process = subprocess.Popen(
            launch.fork_server_command(self._name, os.getpid(), preparation),
            stdin=subprocess.DEVNULL,
            stdout=2,
            env={**launch.fork_server_environment(json.dumps(redact(asdict(model)))), **environment},
            start_new_session=True,
        )

    @property
    def executable(self) -> str:
        """For Ray to run in the place of the interpreter, by a shell.

        On a node that has Python or this package at another place it is that of Ray itself, found by its script.
        """
        assert launch.__file__
        python, script = sys.executable, launch.__file__
        launcher = shlex.join([python, "-I", "-S", script, self._name, self._preparation])
        there = f"[ -x {shlex.quote(python)} ] && [ -f {shlex.quote(script)} ]"
        other = '"${1%/lib/python*}/bin/python3"'
        return shlex.join(["/bin/sh", "-c", f'if {there}; then exec {launcher} "$@"; else exec {other} "$@"; fi', "sh"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def fork_server_for(config: Config, preparation: str) -> ForkServer | None:
    """Start a fork server; None if the job brings an interpreter of its own, or this system no pidfd_open."""
    # Under `uv run` Ray chooses the interpreter itself.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    if not config.cluster.template or any(key in job for key in _EXECUTABLE) or "UV" in os.environ:
        return None
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):  # an old kernel, or another one than Linux
        return None
    return ForkServer(config.model, preparation, process_environment(config))
