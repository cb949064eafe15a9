"""How the workers of a group meet."""

import pickle
import signal
import subprocess
import sys
import threading
from functools import cache
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError
from torch.distributed import TCPStore

from areal_ray.controller import rendezvous
from areal_ray.controller.rendezvous import GroupTorchConfig, ProcessGroupError, wait_for

pytestmark = pytest.mark.unit

LIMIT_S = 30


class Workers:
    """Says what is done with them, and in which order."""

    def __init__(self, ending=None, gpus=0):
        self.done, self.reached, self.ending, self.gpus = [], {}, ending, gpus

    def __len__(self):
        return 2

    def execute_single(self, rank, function, *args, **kwargs):
        self.done.append(function.__name__)
        return function(*args, **kwargs)

    def execute_single_async(self, rank, function, **kwargs):
        self.done.append(f"{function.__name__} {rank}")

    def execute(self, function, *args, **kwargs):
        self.done.append(f"{function.__name__} {kwargs or args}")
        return ["node-a at 10.0.0.1 (interface eth0)"] * 2 + ["node-b at 10.0.0.2 (interface eth1)"]

    def get_resources_per_worker(self):
        return {"CPU": 1, "GPU": self.gpus}


@pytest.fixture
def start(monkeypatch):
    """Starts the process group of workers."""
    monkeypatch.setattr("ray.train.torch.config.ray.get", lambda futures: None)
    monkeypatch.setattr(rendezvous.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(rendezvous, "tcp_store", cache(rendezvous.tcp_store.__wrapped__))
    chosen = GroupTorchConfig(backend="gloo")
    return lambda workers: chosen.backend_cls().on_start(workers, chosen)


def test_the_store_of_rank_0_is_open_before_the_ranks_meet_there(start):
    workers = Workers()
    start(workers)
    store = rendezvous.tcp_store()
    where = {"addr": store.host, "port": store.port}
    assert workers.done[:3] == ["use_own_interface ()", "_address", f"set_env_vars {where}"]
    assert workers.done[-2:] == ["_setup_torch_process_group 0", "_setup_torch_process_group 1"]
    assert set(workers.reached) == {"ready"}
    client = TCPStore(store.host, store.port, is_master=False)
    client.set("here", "yes")
    again = TCPStore(store.host, store.port, is_master=True, multi_tenant=True, wait_for_workers=False)
    assert again.get("here") == b"yes"


def test_a_process_group_that_does_not_form_says_between_which_addresses(start, monkeypatch):
    def fail(futures):
        raise RayTaskError(
            "_setup_torch_process_group", "Traceback\n...", RuntimeError("connect: [127.0.1.1]:4 refused")
        )

    monkeypatch.setattr("ray.train.torch.config.ray.get", fail)
    with pytest.raises(ProcessGroupError) as caught:
        start(Workers())
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    for error in (caught.value, again):
        assert str(error) == (
            "no process group between node-a at 10.0.0.1 (interface eth0), node-b at 10.0.0.2 (interface eth1): "
            "connect: [127.0.1.1]:4 refused"
        )
        assert isinstance(error.cause, RuntimeError)


@pytest.mark.parametrize(("seconds", "said"), [(6.2, True), (0.1, False)])
def test_a_name_server_that_takes_long_is_named(seconds, said):
    lines, now = [], iter([100.0, 100.0 + seconds])

    def look_up(address, flags):
        raise OSError("no name")

    rendezvous.name_slow_lookup("10.0.0.7", lines.append, look_up, lambda: next(now))
    assert [line.partition(", and")[0] for line in lines] == [
        "the name server takes 6 s for the name of 10.0.0.7"
    ] * said


@pytest.mark.parametrize(("ending", "gpus", "waits"), [({"n": [7]}, 1, True), ({"n": [7]}, 0, False), ({}, 1, False)])
def test_a_gpu_is_free_before_it_is_used(start, ending, gpus, waits):
    workers = Workers(ending, gpus)
    start(workers)
    assert (workers.done[0] == f"wait_for {(ending,)}") == waits
    assert sum(done.startswith("wait_for") for done in workers.done) == waits


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(rendezvous.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "this node"))


@pytest.fixture
def living():
    """A process that lives until it is ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_processes_that_are_ending_on_this_node_are_waited_for(here, living, monkeypatch):
    waiting, real = threading.Event(), rendezvous.psutil.wait_procs

    def wait_procs(processes, timeout):
        waiting.set()
        return real(processes, timeout)

    monkeypatch.setattr(rendezvous.psutil, "wait_procs", wait_procs)
    thread = threading.Thread(target=wait_for, args=({"this node": [living.pid]}, LIMIT_S))
    thread.start()
    assert waiting.wait(LIMIT_S)
    assert thread.is_alive()
    living.send_signal(signal.SIGKILL)
    living.wait()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_but_not_for_ever_and_no_others(here, living, monkeypatch):
    waited = []
    real = rendezvous.psutil.wait_procs

    def wait_procs(processes, timeout):
        waited.append([process.pid for process in processes])
        return real(processes, timeout)

    monkeypatch.setattr(rendezvous.psutil, "wait_procs", wait_procs)
    gone = 2**22 + 1  # above the largest process id of Linux
    wait_for({"this node": [gone, living.pid]}, 0.1)
    wait_for({"another node": [living.pid]}, 1e6)
    assert waited == [[living.pid], []]
    assert living.poll() is None
