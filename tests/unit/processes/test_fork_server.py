"""Processes that are copies of a template: everything that one has from who started it, and how both come to an end."""

import json
import os
import resource
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from areal_ray.config import ClusterConfig, Config, ModelConfig
from areal_ray.processes import fork_checks, fork_server, launch
from areal_ray.processes.fork_server import ForkServer, fork_server_for

pytestmark = pytest.mark.unit

LIMIT_S = 60
PREPARATION = "areal_ray.driver.fork_preparation"
ROOT = Path(fork_server.__file__).parents[2]
SERVER = """
import sys, types
from importlib import import_module
sys.path.insert(0, {root!r})
from areal_ray.processes import fork_server_main
fork_server_main._IDLE_S = {idle!r}
sys.modules["preparation"] = types.SimpleNamespace(
    prepare=lambda model: [import_module(name) for name in {before!r}], import_ray=lambda: import_module("smtplib")
)
fork_server_main.main({name!r}, {owner!r}, "preparation")
"""
SAY = """
import json, os, random, resource, signal, sys
import numpy
said = {
    "copy": "smtplib" in sys.modules, "environment": dict(os.environ), "arguments": sys.argv, "folder": os.getcwd(),
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


@pytest.fixture
def started():
    """Processes that a test starts; none of them outlives it."""
    processes = []
    yield processes.append
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a template's copies outlive it
            for copy in psutil.Process(process.pid).children(recursive=True):
                copy.kill()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stdin, process.stderr):
            if stream:
                stream.close()


def until_there(name, process):
    """Wait for it: who asks before would start another one, which would have the pipes of a test."""
    while f"@areal_ray-{name}" not in Path("/proc/net/unix").read_text():
        assert process.poll() is None


@pytest.fixture
def serve(started):
    """Start a template that has imported little; its name and its process."""

    def serve(before=("torch", "numpy.random"), idle=600.0, owner=None, **options):
        name = secrets.token_hex(8)
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


def said(process, text=""):
    out, err = process.communicate(text, timeout=LIMIT_S)
    assert "to stderr" in err
    return json.loads(out)


def first_number(process):
    return int(process.stdout.readline())


def test_a_copy_has_everything_from_the_one_that_started_it(serve, run, tmp_path):
    name, _ = serve()
    # What is read at import, as OPENBLAS_CORETYPE where that is set, must be the template's.
    read = fork_checks.at_import(dict(os.environ))
    own = {**read, "PATH": os.environ["PATH"], "MINE": "1", "PYTHONPATH": "/mine:/yours"}
    folder = tmp_path / "folder"
    folder.mkdir()
    core = max(os.sched_getaffinity(0))

    def prepare():
        os.sched_setaffinity(0, [core])
        resource.setrlimit(resource.RLIMIT_NOFILE, (99, 100))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    process = run(name, SAY, "7", "--flag", env=own, cwd=folder, umask=0o027, preexec_fn=prepare)
    copy = said(process, "a line")
    assert process.returncode == 7
    assert copy["copy"]
    assert {key: value for key, value in copy["environment"].items() if key in own} == own
    assert not {"HOME", "LC_ALL"} & set(copy["environment"])
    assert copy["arguments"] == [str(tmp_path / "script.py"), "7", "--flag"]
    assert (copy["folder"], copy["umask"], copy["main"], copy["input"]) == (str(folder), 0o027, "__main__", "a line")
    assert copy["path"][:3] == [str(tmp_path), "/mine", "/yours"]
    assert copy["group"]  # one that Ray can end as a whole
    assert not copy["leads"]
    assert (copy["cores"], copy["blocked"], copy["files"]) == ([core], [signal.SIGUSR1], [99, 100])
    assert copy["descriptors"] == ["0", "1", "2", "3"]  # the last is of listing them

    alone = subprocess.run(
        [sys.executable, tmp_path / "script.py", "0"], env=own, input="", capture_output=True, text=True
    )
    ordinary = json.loads(alone.stdout)
    assert not ordinary["copy"]
    assert copy["path"] == ordinary["path"]
    assert (copy["oom"], copy["main"]) == (ordinary["oom"], ordinary["main"])


def test_copies_draw_different_random_numbers(serve, run):
    name, _ = serve()
    one, other = (said(run(name, SAY, "0"))["random"] for _ in range(2))
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_one_for_which_something_was_read_otherwise_is_no_copy(serve, run):
    name, _ = serve()
    environment = {**os.environ, "RAY_JOB_ID": "01000000"}
    assert said(run(name, SAY, "0", env=environment))["copy"]
    for change, copy in (
        ({"RAY_TRAIN_X": "1"}, True),
        ({"OTHER": "1"}, True),
        ({"RAY_JOB_ID": "02000000"}, False),
        ({"OMP_NUM_THREADS": "7"}, True),
        ({"LD_PRELOAD": ""}, False),
    ):
        process = run(name, SAY, "3", env={**environment, **change})
        assert said(process)["copy"] is copy
        assert process.returncode == 3


def test_where_the_template_is_of_no_use_the_process_is_an_ordinary_one(serve, run):
    name, server = serve(before=("no_such_module",))
    for _ in range(2):
        process = run(name, SAY, "5")
        assert not said(process)["copy"]
        assert process.returncode == 5
    server.kill()
    assert b"No module named 'no_such_module'" in server.stderr.read()


def test_a_copy_that_ends_ends_the_one_that_stands_for_it(serve, run):
    name, _ = serve()
    process = run(name, WAIT)
    os.kill(first_number(process), signal.SIGKILL)
    assert process.wait(LIMIT_S) == 256 - signal.SIGKILL


def test_one_that_is_ended_takes_its_copy_with_it(serve, run):
    name, _ = serve()
    process = run(name, WAIT)
    copy = psutil.Process(first_number(process))
    process.kill()
    psutil.wait_procs([copy], timeout=LIMIT_S)
    assert not copy.is_running()
    assert said(run(name, SAY, "0"))["copy"]  # and the template serves on


def test_copies_outlive_the_template(serve, run):
    name, server = serve()
    process = run(name, WAIT)
    copy = psutil.Process(first_number(process))
    server.kill()
    server.wait()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    copy.kill()
    assert process.wait(LIMIT_S) == 1


def test_it_ends_with_its_owner(serve, run, started):
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started(owner)
    name, server = serve(owner=owner.pid)
    assert said(run(name, SAY, "0"))["copy"]
    owner.kill()
    owner.wait()
    assert server.wait(LIMIT_S) == 0


def test_it_ends_when_it_is_needed_no_longer(serve, run):
    name, server = serve(idle=0.5)
    process = run(name, WAIT)
    copy = first_number(process)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(1.5)
    os.kill(copy, signal.SIGKILL)
    assert server.wait(LIMIT_S) == 0


def test_where_there_is_none_one_is_started(run):
    name = secrets.token_hex(8)
    one, other = run(name, WAIT), run(name, WAIT)
    copies = [psutil.Process(first_number(process)) for process in (one, other)]
    (server,) = {copy.parent() for copy in copies}
    assert server.pid != os.getpid()
    try:
        assert server.cmdline()[-3:-1] == [name, str(os.getpid())]  # which started the launcher, as the raylet does
        assert server.parent().pid not in {process.pid for process in (one, other)}
        assert server.uids().real == os.getuid()
    finally:
        for left in (server, *copies):
            left.kill()


def test_one_that_may_more_than_the_template_is_no_copy(serve, run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    less = hard - 1 if hard > 0 else 4096
    name, _ = serve(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, less), less)))
    process = said(run(name, SAY, "0"))
    assert not process["copy"]
    assert process["files"] == [soft, hard]


def test_signals_reach_the_copy(serve, run):
    name, _ = serve()
    process = run(
        name,
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n",
    )
    first_number(process)
    process.terminate()
    assert process.wait(LIMIT_S) == 5


def test_of_another_user_nothing_is_taken(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        launch.check_peer(one)
        monkeypatch.setattr(launch.os, "getuid", lambda: 1 + os.geteuid())
        with pytest.raises(PermissionError, match="another user"):
            launch.check_peer(one)


def test_containers_that_share_a_network_have_templates_of_their_own():
    spaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("mnt", "pid")]
    assert launch.address("name") == "\0areal_ray-name-" + "-".join(spaces)


def test_a_copy_begins_with_a_word_and_not_before(serve, tmp_path, started):
    name, _ = serve()
    script, log = tmp_path / "once.py", tmp_path / "log"
    script.write_text(f"open({str(log)!r}, 'a').write('x')")
    for word, text in ((b"", ""), (launch.GO, "x")):
        log.write_text("")
        wait, go = os.pipe()
        with launch._connect(name, PREPARATION, time.monotonic() + LIMIT_S) as connection:
            request = json.dumps(launch._own([str(script)])).encode()
            launch.send_request(connection, request, wait)
            copy = psutil.Process(launch.receive_number(connection))
            os.close(wait)
            os.write(go, word)
            os.close(go)
            psutil.wait_procs([copy], timeout=LIMIT_S)
            assert log.read_text() == text


def test_a_copy_does_nothing_if_who_asked_has_waited_no_longer(serve, run, tmp_path, started):
    name, server = serve()
    assert said(run(name, SAY, "0"))["copy"]
    server.send_signal(signal.SIGSTOP)
    script, log = tmp_path / "once.py", tmp_path / "log"
    script.write_text(f"open({str(log)!r}, 'a').write('x')")
    arguments = name, PREPARATION, str(script)
    own = f"from areal_ray.processes import launch; launch._WAIT_S = 0.2; launch.main(*{arguments!r})"
    subprocess.run([sys.executable, "-c", own], cwd=ROOT, check=True, timeout=LIMIT_S)
    server.send_signal(signal.SIGCONT)
    assert said(run(name, SAY, "0"))["copy"]  # so the request before has been seen
    assert log.read_text() == "x"


def test_a_stopped_copy_ends_with_what_ray_has_started(serve, run, tmp_path, started):
    name, _ = serve()
    script = tmp_path / "stop.py"
    script.write_text("import os, signal\nprint(os.getpid(), flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)\n")
    command = [sys.executable, "-I", "-S", launch.__file__, name, PREPARATION, str(script)]
    raylet = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess\nsubprocess.run({command!r})"], stdout=subprocess.PIPE
    )
    started(raylet)
    copy = psutil.Process(first_number(raylet))
    raylet.kill()
    _, alive = psutil.wait_procs([copy], timeout=LIMIT_S)
    assert alive == []


@pytest.fixture
def own():
    made = ForkServer(ModelConfig(config={"model_type": "llama"}), PREPARATION)
    until_there(made._name, made._process)
    yield made
    made.close()


def test_the_driver_s_ends_when_it_is_closed(own):
    process = psutil.Process(own._process.pid)
    own.close()
    assert not process.is_running()


def through_ray(executable, script, *arguments):
    """As Ray's agent on a node starts a process."""
    command = ["bash", "-c", f"exec {executable} {shlex.quote(str(script))} {shlex.join(arguments)}"]
    environment = {**fork_server.MALLOC, **os.environ}  # as cluster.py has Ray set it
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=LIMIT_S, env=environment)


def test_the_command_for_ray_reaches_it(own, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("import sys\nprint('torch' in sys.modules, sys.argv[1:])")
    assert through_ray(own.executable, script, "--a", "b c").stdout == "True ['--a', 'b c']\n"


def test_where_nothing_of_it_is_found_ray_has_its_own_python(own, tmp_path, monkeypatch):
    script = tmp_path / "lib/python3.99/site-packages/worker.py"
    script.parent.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    script.write_text("import sys\nprint(sys.executable, sys.argv[1:])")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "elsewhere.py"))
    done = through_ray(own.executable, script, "--a", "b c")
    assert done.stdout == f"{tmp_path}/bin/python3 ['--a', 'b c']\n"


def test_there_may_be_none(monkeypatch):
    monkeypatch.setattr(fork_server, "ForkServer", lambda *_: "made")
    monkeypatch.delenv("UV", raising=False)
    assert fork_server_for(Config(), PREPARATION) == "made"
    assert fork_server_for(Config(cluster=ClusterConfig(template=False)), PREPARATION) is None
    monkeypatch.setenv("UV", "/bin/uv")
    assert fork_server_for(Config(), PREPARATION) is None


@pytest.mark.parametrize("environment", [{"pip": ["x"]}, {"py_executable": "other"}, {"image_uri": "x"}])
def test_jobs_that_bring_their_own_interpreter_have_none(monkeypatch, environment):
    monkeypatch.setattr(fork_server, "ForkServer", lambda *_: "made")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "."}}))
    assert fork_server_for(Config(), PREPARATION) == "made"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment}))
    assert fork_server_for(Config(), PREPARATION) is None
