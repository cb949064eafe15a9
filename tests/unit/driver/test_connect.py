"""Options and environment with which a connection to a cluster is opened."""

import os
import socket
from functools import partial
from pathlib import Path

import pytest
import ray

from areal_ray.cli.main import main
from areal_ray.config import ConfigError, load
from areal_ray.driver import connect

pytestmark = pytest.mark.unit

TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")
PORT = "RAY_GCS_SERVER_PORT"


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """What `ray.init` was called with, and the port in the environment then; no cluster is started."""
    calls = []
    session = tmp_path / "session"
    (session / "logs" / "old").mkdir(parents=True)
    monkeypatch.setattr(connect.ray_internals, "session_directory", lambda: str(session))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append((options, os.environ.get(PORT))))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in ("RAY_ADDRESS", PORT):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RAY_COLOR_PREFIX", "0"), ("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")):  # set, and left so
        monkeypatch.setenv(name, value)
    return calls


@pytest.fixture
def config():
    return load(TINY, ["cluster.template=false", "cluster.standbys=off"])


@pytest.mark.parametrize("own", [None, "6123"])
def test_the_port_of_a_cluster_of_one_s_own_is_set_while_it_starts_only(opened, config, monkeypatch, own):
    if own:
        monkeypatch.setenv(PORT, own)
    with connect.cluster(config, fast=False):
        assert os.environ.get(PORT) == own
    ((options, port),) = opened
    assert port == (own or port) is not None
    assert options["runtime_env"]["env_vars"]["RAY_ADDRESS"].endswith(f":{port}")


def test_a_start_that_fails_leaves_no_port_behind(opened, config, monkeypatch):
    def init(**options):
        raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError), connect.cluster(config, fast=False):
        pass
    assert PORT not in os.environ


OTHERS = """Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.11.4
This process on node 10.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.9
"""


def test_a_cluster_of_another_ray_or_python_is_one_line(opened, config, monkeypatch):
    def init(**options):
        raise RuntimeError(OTHERS)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError) as caught, connect.cluster(config, fast=False):
        pass
    said = "the cluster has Ray 2.59.0 and Python 3.11.4, and here is Ray 2.60.0 and Python 3.11.9"
    assert str(caught.value) == f"RAY_ADDRESS: {said}: they must be the same"


def test_a_token_that_the_cluster_does_not_take_is_one_line(opened, config, monkeypatch):
    def init(**options):  # as Ray does it
        told = (
            "Failed to connect to GCS. Last connection error: Traceback\nray.exceptions.AuthenticationError: RPC error"
        )
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.7:6379") from RuntimeError(told)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError) as caught, connect.cluster(config, fast=False):
        pass
    assert str(caught.value) == f"RAY_ADDRESS: {connect.WRONG_TOKEN}"


def test_what_else_ray_says_stays_as_it_is(opened, config, monkeypatch):
    def init(**options):
        raise RuntimeError("no room")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="no room"), connect.cluster(config, fast=False):
        pass


def test_an_address_where_nobody_answers_is_one_line(monkeypatch, capsys):
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(connect, "unreachable", partial(connect.unreachable, 0.0))
        monkeypatch.setattr(connect, "use_token", lambda: None)
        assert main(["train", "--config", TINY]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"no Ray cluster answers at {address}, which RAY_ADDRESS names" in line
        bound.listen()
        assert connect.unreachable() is None


@pytest.mark.parametrize("fast", [True, False])
def test_processes_of_the_job_know_the_cluster_that_ray_address_names(opened, config, monkeypatch, fast):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    with connect.cluster(config, fast=fast):
        pass
    assert opened[0][0]["runtime_env"]["env_vars"]["RAY_ADDRESS"] == "10.0.0.7:6379"


def test_the_decision_of_the_caller_counts(opened, monkeypatch):
    config = load(TINY, ["cluster.template=false"])
    ahead = []
    monkeypatch.setattr(connect, "_start_ahead", lambda config: ahead.append(config.standbys(1)))
    for fast in (True, False):
        with connect.cluster(config, fast=fast):
            pass
    assert ahead == [1, 0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("gpus", [True, False])
def test_variables_of_the_configuration_are_those_of_all_processes(opened, monkeypatch, fast, gpus):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    chosen = "cluster.env={NCCL_IB_TIMEOUT: 22, CUBLAS_WORKSPACE_CONFIG: ':4096:8', TOKENIZERS_PARALLELISM: 'yes!'}"
    config = load(TINY, ["cluster.template=false", "cluster.standbys=off", f"cluster.use_gpu={gpus}", chosen])
    with connect.cluster(config, fast=fast):
        pass
    variables = opened[0][0]["runtime_env"]["env_vars"]
    assert {name: variables[name] for name in config.cluster.env} == {
        "NCCL_IB_TIMEOUT": "22",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "yes!",
    }
    one_heap = "glibc.malloc.arena_max=1"  # with GPUs many threads allocate at once
    assert (one_heap in variables["GLIBC_TUNABLES"]) is not gpus


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_of_a_cluster_of_one_s_own_others_can_neither_read_the_token_nor_change_the_logs(
    opened, config, monkeypatch, tmp_path, no_umask
):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = [tmp_path / "session" / name for name in (".", "logs", "logs/old")]
    for folder in folders:
        folder.chmod(0o777)  # as Ray does
    with connect.cluster(config, fast=True):
        assert [mode(folder) for folder in folders] == [0o775] * 3
        (tmp_path / "file").touch()
        assert mode(tmp_path / "file") == 0o664
    token = tmp_path / ".ray" / "auth_token"
    assert mode(token) == 0o600
    text = token.read_text()
    assert len(text) == 64
    with connect.cluster(config, fast=True):
        assert token.read_text() == text


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "x"), ("RAY_ADDRESS", "10.0.0.7:6379")]
)
def test_no_token_is_made_that_ray_would_not_make(opened, config, monkeypatch, tmp_path, name, value):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv(name, value)
    with connect.cluster(config, fast=True):
        pass
    assert not (tmp_path / ".ray").exists()
