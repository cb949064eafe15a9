"""The fork server itself, a script: it forks a copy of itself for every launcher that asks; see fork_server.py."""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of whatever Python path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from areal_ray.config import ModelConfig
from areal_ray.processes import fork_checks, launch
from areal_ray.processes.hidden_devices import touched

IDLE_S = 60.0  # without a process of the job on this node the server is not needed
_ANSWER_S = 5.0  # for a request that has begun


@dataclass
class _Child:
    pid: int
    ended: int  # its process as a file descriptor
    connection: socket.socket  # to the launcher that stands for it


class Server:
    """Forks a copy of this process for every launcher that asks.

    Args:
        name: by which it is found.
        owner: process id; the server ends with it.
        preparation: module whose `prepare` and `import_ray` are called before the first fork.
        model: to get ready for; None if it is not known.
        idle_s: seconds without a process of the job after which the server ends.
    """

    def __init__(
        self, name: str, owner: int, preparation: str, model: ModelConfig | None, idle_s: float = IDLE_S
    ) -> None:
        self._name, self._preparation, self._model, self._idle_s = name, preparation, model, idle_s
        self._owner = os.pidfd_open(owner)
        self._base = fork_checks.base_path()
        self._surroundings = launch.surroundings()
        self._read = fork_checks.at_import(dict(os.environ))
        self._listener = socket.socket(socket.AF_UNIX)
        self._children: dict[int, _Child] = {}  # by process id
        self._adopted: dict[str, str] | None = None  # what Ray has read of the environment
        self._broken = False
        self._said: set[str] = set()  # reasons for refusals
        self.refused = fork_checks.RefusedPeers()
        self._used = time.monotonic()  # when a process of the job was here last

    def serve(self) -> Callable[[], None] | None:
        """Serve until no process is left to serve, then None; in each fork, its work."""
        try:
            self._listener.bind(launch.address(self._name))
        except OSError:  # another one was faster
            return None
        self._listener.listen(1024)  # requests wait there for the imports
        self._try(lambda: import_module(self._preparation).prepare(self._model))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_request)
        self._selector.register(self._owner, selectors.EVENT_READ, None)
        self._used = time.monotonic()
        while True:
            left = self._used + self._idle_s - time.monotonic()
            for key, _ in self._selector.select(None if self._children else left):
                if key.data is None:
                    return None
                if work := key.data():
                    return work
            # Not "nothing was ready": others who knock keep no server alive.
            if not self._children and time.monotonic() >= self._used + self._idle_s:
                return None

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # noqa: BLE001  (whatever a model's code raises; the others will say so again, at its place)
            traceback.print_exc()
            self._broken = True
        gc.collect()
        gc.freeze()  # or the first collection in each fork would touch, and so copy, every page

    def _on_request(self) -> Callable[[], None] | None:
        connection, _ = self._listener.accept()
        connection.settimeout(_ANSWER_S)
        try:
            launch.check_peer(connection)
            request, descriptors = launch.receive_request(connection)
        except (OSError, ValueError) as error:  # it is gone, or nobody of ours
            self.refused.add(error)
            connection.close()
            return None
        self._used = time.monotonic()
        refusal = self._refusal(request)
        pid = refusal if refusal is not None else self._fork()
        if pid is None:
            return lambda: self._become(request, descriptors, connection)
        for descriptor in descriptors:
            os.close(descriptor)
        # A launcher that has not waited is an ordinary process now, and its connection will say so.
        with suppress(OSError):
            launch.send_number(connection, pid)
        if pid <= launch.REFUSED:
            connection.close()
        else:
            self._watch(_Child(pid, os.pidfd_open(pid), connection))
        return None

    def _refusal(self, request: dict[str, Any]) -> int | None:
        """The answer to a request for a process that no fork of this one can be; None if one can."""
        if self._adopted is not None and request["environment"].get(launch.NODE) != self._adopted.get(launch.NODE):
            return launch.OF_ANOTHER_NODE
        if not (reason := self._misfit(request)):
            return None
        if reason not in self._said:
            self._said.add(reason)
            print(f"fork server: processes are started anew, not forked: {reason}", file=sys.stderr)
        return launch.REFUSED

    def _misfit(self, request: dict[str, Any]) -> str:
        """Why no fork of this process can be the process that the request asks for; "" if one can."""
        environment, own = request["environment"], self._surroundings
        if request["groups"] != own["groups"]:
            return "they are of another control group"
        if differing := fork_checks.differing(fork_checks.at_import(environment), self._read):
            return f"libraries read {differing} when they are loaded, and it is another one there"
        if not fork_checks.within(request["limits"], own["limits"]):
            return "they may have more resources (ulimit)"
        if self._adopted is None:
            self._adopt(environment)
        if self._broken:
            return "the preparation failed, see above"
        if differing := fork_checks.differing(fork_checks.of_ray(environment), self._adopted or {}):
            return f"Ray reads {differing} when it is imported, and it is another one there"
        return ""

    def _adopt(self, environment: dict[str, str]) -> None:
        """Import Ray as a process of this job does."""
        before = dict(os.environ)
        self._adopted = fork_checks.of_ray(environment)
        os.environ.clear()
        os.environ.update(environment)
        path = [*fork_checks.python_path(environment), *self._base]
        sys.path[:] = path
        self._try(lambda: import_module(self._preparation).import_ray())
        self._added = [place for place in sys.path if place not in path]  # Ray brings some modules along
        os.environ.clear()
        os.environ.update(before)

    def _fork(self) -> int | None:
        """The process id of a new fork; in the fork None."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            return os.fork() or None
        except OSError as error:  # no memory, or too many processes
            print(f"fork server: {error}", file=sys.stderr)
            return launch.REFUSED

    def _watch(self, child: _Child) -> None:
        self._children[child.pid] = child
        self._selector.register(child.ended, selectors.EVENT_READ, lambda: self._reap(child))
        self._selector.register(child.connection, selectors.EVENT_READ, lambda: self._end(child))

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        self._used = time.monotonic()
        self._selector.unregister(child.ended)
        os.close(child.ended)
        if child.connection.fileno() >= 0:
            with suppress(OSError):  # its launcher has been ended first
                launch.send_number(child.connection, os.waitstatus_to_exitcode(status) & 0xFF)
            self._selector.unregister(child.connection)
            child.connection.close()

    def _end(self, child: _Child) -> None:
        """End a fork, as the launcher that stands for it has been ended."""
        if child.pid in self._children:  # else it has been reaped just now
            signal.pidfd_send_signal(child.ended, signal.SIGKILL)
            self._selector.unregister(child.connection)
            child.connection.close()

    def _become(self, request: dict[str, Any], descriptors: list[int], connection: socket.socket) -> None:
        """Become the process that was asked for."""
        self._selector.close()
        for child in self._children.values():
            os.close(child.ended)
            child.connection.close()
        os.close(self._owner)
        self._listener.close()
        connection.close()
        *streams, go = descriptors
        if os.read(go, 1) != launch.GO:  # the launcher has become an ordinary process
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
        fits = fork_checks.inherit(request)
        if not fits or touched():
            if fits:
                print("fork server: this process is started anew, a fork could not use CUDA", file=sys.stderr)
            os.execv(sys.executable, [sys.executable, *command])
        sys.argv = command
        sys.path[:] = [*self._added, os.path.dirname(command[0]), *fork_checks.python_path(environment), *self._base]
        sys.modules["numpy"].random.seed()  # not the same in all forks; Python sees to its own
        runpy.run_path(command[0], run_name="__main__")


def main(name: str, owner: str, preparation: str, idle_s: float = IDLE_S) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT):  # a shell that starts something in the background has them ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Python 3.12 warns of every fork beside threads. Those here are of OpenBLAS and its like: see fork_server.py.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    model = os.environ.get(launch.MODEL)
    known = ModelConfig(**json.loads(model)) if model else None
    server = Server(name, int(owner), preparation, known, idle_s)
    work = server.serve()
    if work is None:
        server.refused.say()
    else:
        work()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
