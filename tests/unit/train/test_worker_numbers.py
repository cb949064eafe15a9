"""Numbers of all workers, and the share of the time that counted."""

from types import SimpleNamespace

import pytest

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.train.cadence import Cadence
from areal_ray.train.tracking import StepMetrics
from areal_ray.train.worker_numbers import CountedTime, WorkerNumbers

pytestmark = pytest.mark.unit


def numbers(rows, device_s=None, parts=2):
    """Of rank 0 of as many ranks as there are rows: positions, tokens, bytes of each."""
    return WorkerNumbers(lambda own: rows, parts, SimpleNamespace(positions=0, tokens=0), lambda: 0, device_s)


def test_padding_counts_as_work_of_the_device_and_not_as_tokens():
    rows = [[100.0, 80.0, 5e9], [100.0, 100.0, 7e9]]
    workers = numbers(rows, device_s=1e-3)
    workers.collect()
    first = workers.speeds(2.0)
    assert (first["tokens_per_s"], first["tokens_per_s_per_worker"], first["padding_share"]) == (90.0, 45.0, 0.1)
    assert first["mfu"] == 0.05  # 100 positions a second, a thousandth of a second each, on two devices
    assert (first["memory_peak_bytes"], first["memory_peak_rank"]) == (7_000_000_000, 1)
    rows[0][:2], rows[1][:2] = [200.0, 180.0], [200.0, 200.0]
    workers.collect()
    second = workers.speeds(1.0)
    assert second["tokens_per_s"] == 200.0
    assert "padding_share" not in second


def test_ranks_that_share_a_part_of_the_batch_count_it_once():
    workers = numbers([[100.0, 100.0, 1.0]] * 4, parts=2)
    workers.collect()
    assert workers.speeds(1.0)["tokens_per_s"] == 200.0
    elsewhere = WorkerNumbers(lambda own: None, 2, SimpleNamespace(positions=1, tokens=1), lambda: 0)
    elsewhere.collect()
    assert elsewhere.speeds(1.0) == {}


def test_all_ranks_are_asked_for_a_line_and_for_nothing_else():
    asked = []
    workers = numbers([[1.0, 1.0, 1.0]])
    workers.collect = lambda: asked.append(True)
    metrics = StepMetrics(Cadence(3), [], 7, 1, 1, workers=workers)
    for step in range(1, 8):
        metrics.begin_step()
        metrics.end_step(step, 0, 0.1)
    assert len(asked) == 3  # steps 3, 6 and the last


def test_seconds_of_steps_count_with_each_line_and_going_back_goes_back():
    calls = []
    counted = SimpleNamespace(
        add=lambda seconds: calls.append(seconds > 0),
        share=lambda: {"counted_share": 0.5},
        rewind=lambda: calls.append("back"),
    )
    lines = []
    sink = SimpleNamespace(log=lambda step, values: lines.append(values["counted_share"]), rewind=calls.append)
    metrics = StepMetrics(Cadence(2), [sink], 9, 1, 1, counted=counted)
    for step in range(1, 5):
        metrics.begin_step()
        metrics.end_step(step, 0, 0.1)
        metrics.write(step)
    metrics.rewind(2)
    assert calls == [True, True, 2, "back"]  # after the lines have been taken back
    assert lines == [0.5, 0.5]


@pytest.fixture
def run(tmp_path):
    made = RunDir(LocalStorage(tmp_path / "run"))
    made.storage.ensure()
    return made


def test_steps_that_are_computed_again_count_once(run):
    now = [1000.0]
    counted = CountedTime(run, lambda: now[0])
    counted.rewind()
    assert counted.share() == {}  # nobody knows since when
    run.event("submitted", last_step=9)
    submitted = run.newest("submitted")["time"]
    counted.rewind()
    now[0] = submitted + 10.0
    counted.add(5.0)
    assert counted.share() == {"counted_share": 0.5}
    run.log_metrics(5, {"time": now[0], **counted.share()})
    now[0] = submitted + 20.0
    counted.add(10.0)
    run.log_metrics(10, {"time": now[0], **counted.share()})
    for again in (counted, CountedTime(run, lambda: now[0])):  # gone back, and started again
        run.rewind_metrics(5)
        again.rewind()
        assert again.share() == {"counted_share": 0.25}


@pytest.mark.parametrize("line", [{"time": 5.0, "counted_share": 0.9}, {"time": "x", "counted_share": "y"}, {}])
def test_lines_of_an_earlier_submission_and_of_older_versions_do_not_count(run, line):
    run.log_metrics(5, line)
    run.event("submitted", last_step=9)
    counted = CountedTime(run, lambda: run.newest("submitted")["time"] + 4.0)
    counted.rewind()
    counted.add(1.0)
    assert counted.share() == {"counted_share": 0.25}
