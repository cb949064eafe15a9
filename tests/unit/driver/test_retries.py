"""A submitted job whose driver dies is submitted again, one that has ended by itself is not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import ServerDisconnectedError
from ray import job_submission
from ray.job_submission import JobStatus

from areal_ray.cli.main import main
from areal_ray.driver.jobs import server as server_of
from areal_ray.driver.jobs import submit as submitting

pytestmark = pytest.mark.unit

TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")
GONE = RuntimeError("Request failed with status code 404: Job it-1 does not exist.")


class Server:
    """A job server; each job ends as the next of `ends` says: a status and an exit status, or an exception."""

    def __init__(self, *ends):
        self.address, self.client = "http://h:1", self
        self._ends, self.jobs = list(ends), []

    def submit(self, run, command, folder, metadata):
        self.jobs.append(command)
        return f"{run}-{len(self.jobs)}"

    async def tail_job_logs(self, job):
        yield f"output of {job}\n"
        raise ServerDisconnectedError if len(self.jobs) == 1 else RuntimeError("closed")  # the job is asked after

    def get_job_info(self, job):
        end = self._ends[len(self.jobs) - 1]
        if isinstance(end, Exception):
            raise end
        return SimpleNamespace(status=end[0], driver_exit_code=end[1], message="the node has died")


@pytest.fixture
def submit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a small folder to upload

    def submit(server, *options):
        monkeypatch.setattr(submitting, "Jobs", lambda address: server)
        monkeypatch.setattr(submitting, "_AWAY_S", 0.0)
        monkeypatch.setattr(submitting, "_LOOK_S", 0.0)
        return main(["submit", "--config", TINY, "run.name=it", *options])

    return submit


FAILED, DONE = JobStatus.FAILED, JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("death", "said"),
    [
        ((FAILED, -9), "job it-1: its driver was ended by SIGKILL"),
        ((FAILED, 137), "job it-1: its driver was ended by SIGKILL"),
        ((FAILED, 250), "job it-1: its driver has left with status 250"),
        ((FAILED, None), "job it-1: the node has died"),
        (GONE, "job it-1: http://h:1 does not know it any more: its cluster is gone"),
    ],
)
def test_one_that_has_died_is_submitted_again(submit, capsys, death, said):
    server = Server(death, (DONE, 0))
    assert submit(server, "--retries", "1") == 0
    out, err = capsys.readouterr()
    assert said in err
    assert "submitting it again, retry 1 of 1\njob it-2 on http://h:1" in out
    assert len(server.jobs) == 2
    assert server.jobs[0] == server.jobs[1]


def test_it_is_not_submitted_more_often_than_that(submit):
    server = Server((FAILED, -9), (FAILED, -9), (DONE, 0))
    assert submit(server, "--retries", "1") == 137
    assert len(server.jobs) == 2


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ((DONE, 0), 0),
        ((FAILED, 1), 1),  # training failed for good
        ((FAILED, 2), 2),
        ((FAILED, 130), 130),  # asked to stop, and saved
        ((JobStatus.STOPPED, None), 1),
        (ConnectionError("away"), 1),  # nobody knows what has become of it
    ],
)
def test_one_that_has_ended_by_itself_is_not(submit, end, status):
    server = Server(end, (DONE, 0))
    assert submit(server, "--retries", "3") == status
    assert len(server.jobs) == 1


@pytest.mark.parametrize("options", [["--retries", "-1"], ["--retries", "1", "--detach"]])
def test_what_cannot_be_retried_is_a_mistake(submit, capsys, options):
    server = Server()
    assert submit(server, *options) == 2
    assert "config error: command line: --retries: " in capsys.readouterr().err
    assert server.jobs == []


def test_a_job_server_that_has_no_answer_yet_is_one_line(monkeypatch, capsys):
    def list_jobs():
        raise RuntimeError("Request failed with status code 500: <html>")

    monkeypatch.setattr(server_of, "use_token", lambda: None)
    monkeypatch.setattr(job_submission, "JobSubmissionClient", lambda *_, **__: SimpleNamespace(list_jobs=list_jobs))
    assert main(["status", "it", "--address", "http://h:1"]) == 1
    assert capsys.readouterr().err.startswith("areal-ray: http://h:1 does not say which jobs it has: Request failed")
    with pytest.raises(ConnectionError):
        server_of.Jobs("http://h:1").newest("it")


@pytest.mark.parametrize(
    ("end", "status", "said"), [((DONE, 0), 0, "output of it-1"), (GONE, 1, "its cluster is gone")]
)
def test_stop_waits_for_what_becomes_of_the_job(monkeypatch, capsys, end, status, said):
    server = Server(end)
    server.jobs.append("train")
    server.get_job_logs = lambda job: f"output of {job}\n"
    server.submit_job = lambda **_: "asking"
    running = SimpleNamespace(is_terminal=lambda: False)
    facts = {"run": "it", "storage_path": "/runs"}
    server.newest = lambda run: SimpleNamespace(submission_id="it-1", status=running, metadata=facts, runtime_env={})
    monkeypatch.setattr(submitting, "Jobs", lambda address: server)
    assert submitting.stop("it") == status
    assert said in "".join(capsys.readouterr())
