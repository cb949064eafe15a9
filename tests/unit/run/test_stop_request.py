"""Asking a run in its directory to save and leave."""

import os
import threading

import pytest

from areal_ray.run import stop_request
from areal_ray.run.lease import hold_lease
from areal_ray.run.stop_request import ask_to_stop, hearing_stop
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


def test_a_driver_hears_once_and_the_one_who_asks_knows(tmp_path):
    run, heard = LocalStorage(tmp_path), threading.Semaphore(0)
    with hold_lease(run, lambda: None, print, settle_s=0.0), hearing_stop(run, heard.release, look_s=0.01):
        ask_to_stop(run)
        assert heard.acquire(timeout=10)
    assert not heard.acquire(blocking=False)
    assert run.names() == []


def test_where_nobody_works_or_nobody_hears_that_is_said(tmp_path):
    run = LocalStorage(tmp_path)
    with pytest.raises(ValueError, match="nobody works on"):
        ask_to_stop(run)
    with hold_lease(run, lambda: None, print, settle_s=0.0), pytest.raises(TimeoutError, match="did not hear"):
        ask_to_stop(run, wait_s=0.01)
    assert run.names() == []


def test_what_was_asked_of_an_earlier_driver_does_not_count(tmp_path):
    run, heard = LocalStorage(tmp_path), []
    (tmp_path / "stop").touch()
    with hearing_stop(run, lambda: heard.append(os.getpid()), look_s=0.01):
        assert run.names() == []
    assert heard == []


def test_who_ends_before_it_has_heard_is_not_waited_for(tmp_path, monkeypatch):
    run, holders = LocalStorage(tmp_path), iter([{"id": "x"}, None])
    monkeypatch.setattr(stop_request, "holder", lambda run: next(holders))
    with pytest.raises(ValueError, match=r"nobody works on .* any more"):
        ask_to_stop(run)
    assert run.names() == []
