"""Fork servers and their forks for the tests; none outlives its test."""

import os
import secrets
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from areal_ray.processes import launch

from .forks import PREPARATION, ROOT, SERVER, until_there


@pytest.fixture
def started():
    """Processes that a test starts; none of them outlives it."""
    processes = []
    yield processes.append
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # the forks of a server outlive it
            for fork in psutil.Process(process.pid).children(recursive=True):
                fork.kill()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stdin, process.stderr):
            if stream:
                stream.close()


@pytest.fixture
def serve(started):
    """Start a fork server that has imported little; its name and its process."""

    def serve(before=("torch", "numpy.random"), idle=600.0, owner=None, name=None, **options):
        name = name or secrets.token_hex(8)
        code = SERVER.format(root=str(ROOT), before=before, idle=idle, name=name, owner=str(owner or os.getpid()))
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stderr=subprocess.PIPE, **options)
        started(process)
        until_there(name, process)
        return name, process

    return serve


@pytest.fixture
def run(tmp_path, started):
    """Start a script as Ray starts a process of a job."""

    def run(name, code, *arguments, **options):
        script = tmp_path / "script.py"
        script.write_text(code)
        command = [sys.executable, "-I", "-S", launch.__file__, name, PREPARATION, str(script), *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, text=True, **pipes, **options)
        started(process)
        return process

    return run
