"""A run in object storage: killed workers, a server that goes away for a while, and keys that nobody sees."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from uuid import uuid4

import pytest

from areal_ray.cli.main import main as run_cli
from areal_ray.run import RunDir
from areal_ray.run.metric_names import CLOCK
from areal_ray.storage import storage_at
from areal_ray.tools import checkpoints
from tests.ray.conftest import EXPERIMENT, SMALL
from tests.s3_server import ACCESS_KEY, SECRET_KEY

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Run:
    """A run directory on the server and the command that works on it."""

    def __init__(self, options):
        path = f"s3://runs/{uuid4().hex}"
        self.storage = storage_at(path, options).sub("run")
        s3 = [f"run.s3.{name}={value}" for name, value in options.items()]
        self._where = [f"run.storage_path={path}", "run.name=run", *s3]
        self.files = RunDir(self.storage)

    def train(self, *overrides):
        return run_cli(["train", "--config", EXPERIMENT, *SMALL, *self._where, *overrides])

    def steps_of(self, kind):
        return [event["step"] for event in self.files.events(kind)]

    def digest(self):
        return checkpoints.digest(self.storage.sub(self.files.result()["checkpoint"]))

    def metrics(self):
        """The logged lines without what the clock says."""
        return [{k: v for k, v in x.items() if k not in CLOCK} for x in self.files.metrics()]


class Screen(io.StringIO):
    """What the driver prints, and whether a certain line has been printed."""

    def __init__(self, awaited):
        super().__init__()
        self._awaited, self.shown = awaited, threading.Event()

    def write(self, text):
        if self._awaited in text:
            self.shown.set()
        return super().write(text)


def everything_in(storage):
    """The bytes of all files, at any depth."""
    below = [everything_in(storage.sub(name)) for name in storage.names() if name not in storage.sizes()]
    return b"".join([*(storage.read(name) for name in storage.sizes()), *below])


def test_a_kill_changes_nothing_and_no_key_is_shown(undisturbed, ray_cluster, server, capfd):
    run = Run(server.options)
    assert run.train("checkpoint.async_save=false", "faults=[{kind: sigkill, rank: 1, step: 6}]") == 0
    shown = capfd.readouterr()
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    assert run.steps_of("restored") == [4]
    assert run.steps_of("saved") == [4, 8, 12]
    assert len(run.files.events("failure")) == 1
    assert run.files.result()["restarts"] == 1
    config = run.storage.read("config.yaml").decode()
    assert server.options["endpoint"] in config
    assert f"run directory: {run.storage.location}" in shown.out
    for text in (shown.out, shown.err, everything_in(run.storage).decode(errors="replace")):
        assert ACCESS_KEY not in text
        assert SECRET_KEY not in text
    capfd.readouterr()
    assert run.train() == 0
    assert "has finished step 12 already" in capfd.readouterr().out


def test_a_server_that_goes_away_for_a_while_costs_a_save_and_nothing_else(undisturbed, ray_cluster, server, proxy):
    # The first request of the second save waits until Ray has written down the first one: a run whose list of
    # checkpoints Ray cannot write ends.
    run = Run({**server.options, "endpoint": proxy.endpoint})
    direct = storage_at(run.storage.location, server.options)

    def stop():
        while b"step-00000004" not in direct.read("checkpoint_manager_snapshot.json"):
            pass
        server.stop()

    proxy.before = {"step-00000008": stop}
    screen = Screen("saving step-00000008.a1 failed")
    with ThreadPoolExecutor(1) as pool, redirect_stdout(screen):
        started = pool.submit(lambda: screen.shown.wait() and server.start())
        try:
            assert run.train() == 0
        finally:
            screen.shown.set()
        started.result()
    assert "NETWORK_CONNECTION" in screen.getvalue()
    assert run.steps_of("save_failed") == [8]
    assert run.steps_of("saved") == [4, 12]
    assert run.files.result()["restarts"] == 0
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()


def test_wrong_keys_are_a_config_error(ray_cluster, server, capfd):
    run = Run({**server.options, "secret_key": "hidden"})
    assert run.train() == 2
    said = capfd.readouterr().err
    assert said.startswith("config error: ")
    assert "run.storage_path" in said
    assert "SignatureDoesNotMatch" in said
    assert "hidden" not in said
    assert ACCESS_KEY not in said
