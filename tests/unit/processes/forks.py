"""A fork server that has imported little, scripts for its forks, and what they say: shared by its tests."""

import json
import os
from pathlib import Path

from areal_ray.processes import fork_server

LIMIT_S = 60
PREPARATION = "areal_ray.driver.fork_preparation"
ROOT = Path(fork_server.__file__).parents[2]
SERVER = """
import sys, types
from importlib import import_module
sys.path.insert(0, {root!r})
from areal_ray.processes import fork_server_main
sys.modules["preparation"] = types.SimpleNamespace(
    prepare=lambda model: [import_module(name) for name in {before!r}], import_ray=lambda: import_module("smtplib")
)
fork_server_main.main({name!r}, {owner!r}, "preparation", idle_s={idle!r})
"""
SAY = """
import json, os, random, resource, signal, sys
import numpy
said = {
    "fork": "smtplib" in sys.modules, "parent": os.getppid(), "environment": dict(os.environ),
    "arguments": sys.argv, "folder": os.getcwd(),
    "umask": os.umask(0), "path": sys.path, "main": __name__, "input": sys.stdin.read(),
    "cores": sorted(os.sched_getaffinity(0)),
    "oom": open("/proc/self/oom_score_adj").read().strip(), "random": [random.random(), float(numpy.random.rand())],
    "descriptors": sorted(os.listdir("/proc/self/fd"), key=int), "group": os.getpgid(0) == os.getpid(),
    "leads": os.getsid(0) == os.getpid(), "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
}
print(json.dumps(said))
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
WAIT = "import os, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"


def until_there(name, process):
    """Wait for it: who asks before would start another one, which would have the pipes of a test."""
    while f"@areal_ray-{name}" not in Path("/proc/net/unix").read_text():
        assert process.poll() is None


def as_a_stranger(work):
    """Have the kernel think that another process has connected, or listens: one of which it can be asked no more."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def said(process, text=""):
    out, err = process.communicate(text, timeout=LIMIT_S)
    assert "to stderr" in err
    return json.loads(out)


def first_number(process):
    return int(process.stdout.readline())
