"""Requests to a job without Ray's internals: the actor that holds them may die."""

import os
import time
from contextlib import suppress

import pytest
import ray
from ray.exceptions import ActorDiedError

from areal_ray.cluster.requests import ActorRequests

pytestmark = pytest.mark.ray


def kill_mailbox(job):
    mailbox = ray.get_actor(f"requests-{job}", namespace="areal_ray")
    ray.kill(mailbox)
    with suppress(ActorDiedError):
        while True:  # it may still answer for a moment
            ray.get(mailbox.first.remote())


@pytest.fixture
def job(ray_cluster):
    job = f"job-{os.getpid()}-{time.monotonic_ns()}"
    yield job
    ActorRequests(job).close()


def test_requests_are_heard_after_the_death_of_their_actor(job):
    driver, worker = ActorRequests(job), ActorRequests(job)
    driver.ask("resize")
    assert worker.asked() == "resize"
    for _ in range(3):
        kill_mailbox(job)
        assert driver.asked() == "resize"  # its own, put back
        assert worker.asked() == "resize"
    kill_mailbox(job)
    assert worker.asked() is None
    driver.clear_resize()
    driver.ask("stop")
    assert worker.asked() == "stop"
    kill_mailbox(job)
    worker.clear_resize()
    assert [driver.asked(), worker.asked()] == ["stop", "stop"]


def test_a_request_that_was_taken_back_does_not_come_back(job):
    driver = ActorRequests(job)
    driver.ask("resize")
    driver.clear_resize()
    kill_mailbox(job)
    assert driver.asked() is None
