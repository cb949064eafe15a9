"""Processes that have imported everything when they begin: copies of one that has, made by fork.

A process of a Ray job spends seconds on importing torch, transformers and Ray, and every process of the job on a node
does so once more. Here one, the template, does it for all of them: the driver starts it when it starts itself, and
tells Ray (`py_executable` of the runtime environment) to run launch.py instead of the interpreter, which asks the
template for a copy. On other nodes the first process that is started has launch.py start the template there.

What must not be done before the fork: opening connections, CUDA, and the import of Ray before a process of the job has
shown its environment, of which Ray's C++ part keeps what it reads (job id, authentication). Threads do not live on in a
copy; those that the imports start, of OpenBLAS and jemalloc, are of libraries that see to it themselves.
A request that does not fit is refused, and becomes an ordinary process with all its imports.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import runpy
import secrets
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # as a script, of whatever Python path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from areal_ray import launch
from areal_ray.config import Config, ConfigError, Model, redact

_IDLE_S = 60.0  # without a process of the job on this node it is not needed
_ANSWER_S = 5.0  # for a request that has begun
# Keys of a job's runtime environment that bring an interpreter of their own.
_EXECUTABLE = ("py_executable", "pip", "uv", "conda", "container", "image_uri", "nsight", "rocprof_sys")
# Names of variables that are read when a library is loaded or imported.
_AT_IMPORT = re.compile(r"(LD|GLIBC|MALLOC|OMP|MKL|OPENBLAS|KMP|GOMP|HF|TRANSFORMERS|TORCH|PYTORCH|CUDA)_")
_MAY_DIFFER = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"}  # set again in each process
_OF_ACTORS = ("RAY_TRAIN_", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")  # read when they run
_BEFORE = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "areal_ray.data",
    "areal_ray.engine",
    "areal_ray.evaluation",
    "areal_ray.journal",
    "areal_ray.loop",
    "areal_ray.rundir",
    "areal_ray.tracking",
    # What Ray imports.
    "click",
    "fsspec",
    "google.protobuf",
    "jsonschema",
    "msgpack",
    "pandas",
    "pyarrow.fs",
    "pydantic",
    "requests",
)
_AFTER = (
    "ray.train.torch",
    "ray.train.v2._internal.execution.preemption",
    "areal_ray.trainer",
    "areal_ray.worker",
)


class Template:
    """A template on this machine, as the driver sees it. To be closed.

    Args:
        model: whose classes are imported, too.
    """

    def __init__(self, model: Model) -> None:
        self._name = secrets.token_hex(16)
        self._process = subprocess.Popen(
            launch.template_command(self._name, os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=launch.template_environment(json.dumps(redact(asdict(model)))),
            start_new_session=True,
        )

    @property
    def executable(self) -> str:
        """For Ray to run in the place of the interpreter, by a shell.

        On a node that has Python or this package at another place it is that of Ray itself, found by its script.
        """
        assert launch.__file__
        python, script = sys.executable, launch.__file__
        launcher = shlex.join([python, "-I", "-S", script, self._name])
        there = f"[ -x {shlex.quote(python)} ] && [ -f {shlex.quote(script)} ]"
        other = '"${1%/lib/python*}/bin/python3"'
        return shlex.join(["/bin/sh", "-c", f'if {there}; then exec {launcher} "$@"; else exec {other} "$@"; fi', "sh"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def template_for(config: Config) -> Template | None:
    """Start one, unless the job has processes of another kind, or this system has not what it takes."""
    # Under `uv run` Ray chooses the interpreter itself.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    if not config.cluster.template or any(key in job for key in _EXECUTABLE) or "UV" in os.environ:
        return None
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):  # an old kernel, or another one than Linux
        return None
    return Template(config.model)


@dataclass
class _Child:
    pid: int
    ended: int  # its process as a file descriptor
    connection: socket.socket  # to the launcher that stands for it


class Server:
    """Forks a copy of this process for everyone who asks.

    Args:
        name: by which it is found.
        owner: process id; the server ends with it.
        model: to get ready for; None if it is not known.
    """

    def __init__(self, name: str, owner: int, model: Model | None) -> None:
        self._name, self._model = name, model
        self._owner = os.pidfd_open(owner)
        self._base = _base_path()
        self._surroundings = launch.surroundings()
        self._read = _at_import(dict(os.environ))
        self._listener = socket.socket(socket.AF_UNIX)
        self._children: dict[int, _Child] = {}  # by process id
        self._adopted: dict[str, str] | None = None  # what Ray has read of the environment
        self._broken = False

    def serve(self) -> Callable[[], None] | None:
        """Serve until there is nobody left to serve: None. In each copy: what it is to do."""
        try:
            self._listener.bind(launch.address(self._name))
        except OSError:  # another one was faster
            return None
        self._listener.listen(64)
        self._try(lambda: _import_all(self._model))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._asked)
        self._selector.register(self._owner, selectors.EVENT_READ, None)
        while True:
            ready = self._selector.select(None if self._children else _IDLE_S)
            if not ready and not self._children:
                return None
            for key, _ in ready:
                if key.data is None:
                    return None
                if work := key.data():
                    return work

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # noqa: BLE001  (whatever a model's code raises; the others will say so again, at its place)
            traceback.print_exc()
            self._broken = True
        gc.collect()
        gc.freeze()  # or the first collection in each copy would touch, and so copy, every page

    def _asked(self) -> Callable[[], None] | None:
        connection, _ = self._listener.accept()
        connection.settimeout(_ANSWER_S)
        try:
            launch.check_peer(connection)
            request, descriptors = launch.receive_request(connection)
        except (OSError, ValueError) as error:  # it is gone, or nobody of ours
            print(f"template: {type(error).__name__}: {error}", file=sys.stderr)
            connection.close()
            return None
        pid = self._fork() if self._fits(request) else launch.REFUSED
        if pid is None:
            return lambda: self._become(request, descriptors, connection)
        for descriptor in descriptors:
            os.close(descriptor)
        # Who has not waited is an ordinary process now, and its connection will say so.
        with suppress(OSError):
            launch.send_number(connection, pid)
        if pid == launch.REFUSED:
            connection.close()
        else:
            self._watch(_Child(pid, os.pidfd_open(pid), connection))
        return None

    def _fits(self, request: dict[str, Any]) -> bool:
        """Whether a copy of this process would be what the request asks for."""
        environment, limits = request["environment"], request["limits"]
        same = request["groups"] == self._surroundings["groups"] and _at_import(environment) == self._read
        if not same or any(_more(limits[kind][1], own) for kind, (_, own) in self._surroundings["limits"].items()):
            return False
        if self._adopted is None:
            self._adopt(environment)
        return not self._broken and _of_ray(environment) == self._adopted

    def _adopt(self, environment: dict[str, str]) -> None:
        """Import Ray as a process of this job does."""
        before = dict(os.environ)
        self._adopted = _of_ray(environment)
        os.environ.clear()
        os.environ.update(environment)
        path = [*_python_path(environment), *self._base]
        sys.path[:] = path
        self._try(_import_ray)
        self._added = [place for place in sys.path if place not in path]  # Ray brings some modules along
        os.environ.clear()
        os.environ.update(before)

    def _fork(self) -> int | None:
        """The copy's process id; in the copy None."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            return os.fork() or None
        except OSError as error:  # no memory, or too many processes
            print(f"template: {error}", file=sys.stderr)
            return launch.REFUSED

    def _watch(self, child: _Child) -> None:
        self._children[child.pid] = child
        self._selector.register(child.ended, selectors.EVENT_READ, lambda: self._reap(child))
        self._selector.register(child.connection, selectors.EVENT_READ, lambda: self._gone(child))

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        self._selector.unregister(child.ended)
        os.close(child.ended)
        if child.connection.fileno() >= 0:
            with suppress(OSError):  # who stood for it has been ended first
                launch.send_number(child.connection, os.waitstatus_to_exitcode(status) & 0xFF)
            self._selector.unregister(child.connection)
            child.connection.close()

    def _gone(self, child: _Child) -> None:
        """The process that Ray started has been ended: so is the one that it stood for."""
        if child.pid in self._children:  # else it has been reaped just now
            signal.pidfd_send_signal(child.ended, signal.SIGKILL)
            self._selector.unregister(child.connection)
            child.connection.close()

    def _become(self, request: dict[str, Any], descriptors: list[int], connection: socket.socket) -> None:
        """Be the process that was asked for."""
        self._selector.close()
        for child in self._children.values():
            os.close(child.ended)
            child.connection.close()
        os.close(self._owner)
        self._listener.close()
        connection.close()
        *streams, go = descriptors
        if os.read(go, 1) != launch.GO:  # who asked has become an ordinary process
            os._exit(1)
        os.close(go)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # Not a session: of a group whose parent has ended the kernel wakes the processes that are stopped.
        os.setpgid(0, 0)
        command, environment = request["command"], request["environment"]
        os.environ.clear()
        os.environ.update(environment)
        fits = _inherit(request)
        if not fits or sys.modules["torch"].cuda._is_in_bad_fork():
            os.execv(sys.executable, [sys.executable, *command])
        sys.argv = command
        sys.path[:] = [*self._added, os.path.dirname(command[0]), *_python_path(environment), *self._base]
        sys.modules["numpy"].random.seed()  # not the same in all copies; Python sees to its own
        runpy.run_path(command[0], run_name="__main__")


def _import_all(model: Model | None) -> None:
    _import(_BEFORE)
    # A factory's module may import Ray, and a name on the hub may be asked for over the network.
    if model is not None and not model.factory and (not model.path or os.path.isdir(model.path)):
        with suppress(ConfigError):  # said elsewhere, to the user
            import_module("areal_ray.models").build_model(model)
    assert "ray" not in sys.modules, "something imports Ray before it knows the job"


def _import_ray() -> None:
    import ray.actor

    # Every class that becomes an actor's is given a random number. Ray's own would start its generator, and all copies
    # would go on with the same numbers: two workers that call one actor would be taken for one.
    own = ray.actor.ActorClassID
    size = len(own.nil().binary())
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: own(os.urandom(size)))
    try:
        _import(_AFTER)
    finally:
        ray.actor.ActorClassID = own
    drawn = [_in_a_copy(lambda: bytes(ray.WorkerID.from_random().binary())) for _ in range(2)]
    if drawn[0] == drawn[1]:
        raise RuntimeError("copies of a process that has imported Ray would draw the same random numbers")


def _in_a_copy(work: Callable[[], bytes]) -> bytes:
    """What it returns in a fork of this process: a few bytes."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(theirs, work())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with open(ours, "rb") as result:
        return result.read()


def _import(names: Sequence[str]) -> None:
    for name in names:
        import_module(name)


def _of_ray(environment: dict[str, str]) -> dict[str, str]:
    """What Ray has read when it is imported; not what is added for single actors (by Ray Train, and in trainer.py)."""
    ours = {name: value for name, value in environment.items() if name.startswith("RAY_")}
    return {name: value for name, value in ours.items() if not name.startswith(_OF_ACTORS)}


def _at_import(environment: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if _AT_IMPORT.match(k) and k not in _MAY_DIFFER}


def _more(limit: int, than: int) -> bool:
    """Of two limits of resources, where -1 is none."""
    return than != -1 and (limit == -1 or limit > than)


def _python_path(environment: dict[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def _base_path() -> list[str]:
    """Where modules are, whatever the environment says."""
    added = {str(Path(__file__).resolve().parents[1]), *_python_path(dict(os.environ))}
    return [path for path in sys.path if path not in added]


def _inherit(request: dict[str, Any]) -> bool:
    """Take over what a process has from the one that started it; this one was started by another. Whether it could."""
    try:
        os.chdir(request["folder"])
        os.umask(request["umask"])
        os.sched_setaffinity(0, request["cores"])
        for kind, limits in request["limits"].items():
            resource.setrlimit(int(kind), tuple(limits))
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    except (OSError, ValueError) as error:
        print(f"a copy of the template cannot do as it is told: {error}", file=sys.stderr)
        return False
    return True


def main(name: str, owner: str) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT):  # a shell that starts something in the background has them ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = os.environ.get(launch.MODEL)
    work = Server(name, int(owner), Model(**json.loads(model)) if model else None).serve()
    if work is not None:
        work()


if __name__ == "__main__":
    main(*sys.argv[1:])
