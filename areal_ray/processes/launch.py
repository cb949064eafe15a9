"""The launcher: Ray runs it in the place of the interpreter for every process of a job; the fork server makes the fork.

Ray calls it as `python -I -S launch.py NAME PREPARATION script argument ...`. The process that the fork server
(fork_server.py) forks takes over the script, the environment, the working directory and the standard streams; the
launcher stands for it until it ends. Where there is no fork server it starts one; where there can be none it becomes an
ordinary interpreter.

Nothing but the standard library, and little of that: it runs once for every process.
"""

from __future__ import annotations

import array
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

MODEL = "AREAL_RAY_WARM"  # the model to get ready for, in the environment of training workers and their standbys only
REFUSED, OF_ANOTHER_NODE = 0, -1  # instead of a process id
GO = b"1"
NODE = "RAY_RAYLET_PID"  # process id of the node's own process, in the environment of all that it starts
_FIND_S = 5.0  # a fork server that has been started takes its name before it imports
_WAIT_S = 15.0  # for everything, imports of the fork server included; after a minute Ray gives the process up
_LOOK_S, _PARENT_S = 0.05, 1.0
_NUMBER = struct.Struct("!i")
_STREAMS = (0, 1, 2)
_FORWARDED = (signal.SIGTERM, signal.SIGINT)


def address(name: str) -> str:
    """In the abstract namespace: nothing is left in any directory, whatever happens.

    It is one for all containers that share the host's network; a process of another one would be of no use. Every user
    can read it (/proc/net/unix), and take it before: both ends call `check_peer` before they believe anything.
    """
    return "\0areal_ray-{}-{}-{}".format(name, *_namespaces("self"))


def _namespaces(process: int | str) -> list[int]:
    return [os.stat(f"/proc/{process}/ns/{kind}").st_ino for kind in ("mnt", "pid")]


def fork_server_command(name: str, owner: int, preparation: str) -> list[str]:
    """The command that starts a fork server.

    Args:
        name: under which it is found.
        owner: process id; the server ends with it.
        preparation: module whose `prepare` and `import_ray` it calls before it forks.
    """
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fork_server_main.py")
    return [sys.executable, "-P", script, name, str(owner), preparation]


def fork_server_environment(model: str) -> dict[str, str]:
    """The environment of a fork server.

    Args:
        model: ModelConfig as JSON, or "" if it is not known.
    """
    # Whether there are GPUs is asked without CUDA, which could not be used in a fork afterwards.
    return {**os.environ, MODEL: model, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def check_peer(connection: socket.socket) -> None:
    """Raise PermissionError unless a process of this user and this container is at the other end.

    Requests hold secrets in their environment, and what is answered is trusted. At the end that has connected it is
    about the process that called `listen`, and that one must be alive still.
    """
    process, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError("a process of another user")
    with suppress(OSError):  # it is gone, or nothing that this user may look at
        if process != 0 and _namespaces(process) == _namespaces("self"):  # 0: one that is not to be seen from here
            return
    raise PermissionError("a process of another container, or one that is gone")


class Unfit(ConnectionRefusedError):
    """The fork server does not make this process, and has said why."""


def send_number(connection: socket.socket, number: int) -> None:
    connection.sendall(_NUMBER.pack(number))


def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes; ConnectionError if the other end is gone before."""
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionResetError("closed by the other end")
        data += part
    return data


def receive_number(connection: socket.socket) -> int:
    number: int = _NUMBER.unpack(receive(connection, _NUMBER.size))[0]
    return number


def send_request(connection: socket.socket, request: bytes, wait: int) -> None:
    """Send a request, with the standard streams of this process, to `receive_request` at the other end.

    Args:
        connection: to a fork server.
        request: see `_own`, as JSON.
        wait: file descriptor where the word to begin comes from.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [*_STREAMS, wait]))]
    connection.sendmsg([_NUMBER.pack(len(request))], rights)
    connection.sendall(request)


def receive_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request (see `_own`), and as file descriptors the standard streams and where the word to begin comes from."""
    size, descriptors, *_ = socket.recv_fds(connection, _NUMBER.size, len(_STREAMS) + 1)
    try:
        if len(size) < _NUMBER.size or len(descriptors) != len(_STREAMS) + 1:
            raise ConnectionResetError("closed by the other end")
        return json.loads(receive(connection, _NUMBER.unpack(size)[0])), descriptors
    except (OSError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def surroundings() -> dict[str, Any]:
    """Control groups and limits: a process cannot take these over from one that has not started it."""
    with open("/proc/self/cgroup") as groups:
        return {"groups": groups.read(), "limits": _limits()}


def _limits() -> dict[str, tuple[int, int]]:
    return {str(kind): resource.getrlimit(kind) for name, kind in vars(resource).items() if name.startswith("RLIMIT_")}


def _own(command: list[str]) -> dict[str, Any]:
    """Everything that a process has from the one that starts it: the request for a fork."""
    with open("/proc/self/status") as status:
        umask = next(line.split()[1] for line in status if line.startswith("Umask"))
    with open("/proc/self/oom_score_adj") as score:
        oom = score.read().strip()
    return {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": int(umask, 8),
        "oom_score_adj": oom,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "cores": sorted(os.sched_getaffinity(0)),
        **surroundings(),
    }


def _connect(name: str, preparation: str, deadline: float) -> socket.socket:
    find_until, started = time.monotonic() + _FIND_S, False
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(max(_LOOK_S, deadline - time.monotonic()))
        try:
            connection.connect(address(name))
            return connection
        except (ConnectionRefusedError, BlockingIOError) as error:  # there is none, or its queue is full
            connection.close()
            if time.monotonic() > find_until:
                raise
            started = started or isinstance(error, BlockingIOError)
        if not started:  # of several that are started at once one gets the name
            command = fork_server_command(name, os.getppid(), preparation)
            environment = fork_server_environment(os.environ.get(MODEL, ""))
            # By a shell that ends: it is no child of this process, which may become one that ends its children.
            shell = ["/bin/sh", "-c", '"$@" &', "sh", *command]
            subprocess.run(shell, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, check=True)
            started = True
        time.sleep(_LOOK_S)


def _hand_over(name: str, preparation: str, command: list[str], wait_s: float) -> tuple[socket.socket, int]:
    """Have the fork server fork; the connection to it, and the fork as a file descriptor.

    Where a machine has several of Ray's nodes each has a fork server of its own, but for the first.

    Raises:
        OSError: if that cannot be. Then there is no process that does anything.
    """
    deadline = time.monotonic() + wait_s
    connection, number, go = _ask(name, preparation, command, deadline)
    if number == OF_ANOTHER_NODE:
        os.close(go)
        connection.close()
        connection, number, go = _ask(f"{name}-{os.environ.get(NODE)}", preparation, command, deadline)
    if number <= REFUSED:
        raise Unfit("the fork server cannot make this process")
    process = os.pidfd_open(number)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:  # one that comes as soon as the fork has begun is for the fork
        os.write(go, GO)
        _forward_signals(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return connection, process


def _forward_signals(process: int) -> None:
    def forward(number: int, _: object) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(process, number)

    for number in _FORWARDED:
        signal.signal(number, forward)


def _ask(name: str, preparation: str, command: list[str], deadline: float) -> tuple[socket.socket, int, int]:
    """Ask a fork server; the connection to it, its answer, and where the fork is to be told to begin."""
    connection = _connect(name, preparation, deadline)
    check_peer(connection)  # whoever else has taken the name gets no request
    request = json.dumps(_own(command)).encode()
    # The fork begins when it reads a word from here, and ends if this process closes it before.
    wait, go = os.pipe()
    send_request(connection, request, wait)
    os.close(wait)
    connection.settimeout(max(_LOOK_S, deadline - time.monotonic()))
    return connection, receive_number(connection), go


def _stand_for(connection: socket.socket, process: int) -> int:
    """Wait for the end of the process, and end it when the one that has started this one is gone; its status."""
    parent = os.getppid()
    while not select.select([process], [], [], _PARENT_S)[0]:
        if os.getppid() != parent:  # a process that is stopped, say, would not notice by itself
            signal.pidfd_send_signal(process, signal.SIGKILL)
    connection.settimeout(_PARENT_S)
    try:
        return receive_number(connection)
    except OSError:  # the fork server is gone, and the exit status with it
        return 1


def main(name: str, preparation: str, *command: str, wait_s: float = _WAIT_S) -> int:
    """Stand for a process until it ends; its exit status. If there is no fork after `wait_s` seconds, become it."""
    try:
        connection, process = _hand_over(name, preparation, list(command), wait_s)
    except (OSError, subprocess.CalledProcessError) as error:
        if not isinstance(error, Unfit):
            print(f"no fork server: {error}; this process does all its imports itself", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *command])
    return _stand_for(connection, process)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
