"""The loop: what is due when, and that a run which stopped or died goes on as if it had not."""

from types import SimpleNamespace

import pytest

from areal_ray.data import GlobalBatches
from areal_ray.run import RunDir
from areal_ray.run.metric_names import CLOCK
from areal_ray.storage import LocalStorage
from areal_ray.train.bad_steps import BadStepError
from areal_ray.train.evaluation import Evaluator

from .loop_fakes import SEQUENCES, TOTAL, Engine

pytestmark = pytest.mark.unit


def lines(job):
    """The metrics lines but for what the clock says."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in job.recover.run.metrics()]


def test_it_logs_evaluates_and_saves_when_it_is_due_and_at_the_end(start):
    job = start()
    assert job.run.began == list(range(1, TOTAL + 1))
    assert job.recover.steps == [7, 14, 21, 22]
    assert [line["step"] for line in lines(job) if "loss" in line] == [4, 8, 12, 16, 20, 22]
    assert [line["step"] for line in lines(job) if "held_out_loss" in line] == [0, 5, 10, 15, 20, 22]
    assert [line["step"] for line in lines(job)] == [0, 4, 5, 8, 10, 12, 15, 16, 20, 22]
    assert job.recover.finished == 1
    assert job.recover.copied == []


def test_it_copies_to_memory_where_it_does_not_save(start):
    job = start(copy=3)
    assert job.recover.steps == [7, 14, 21, 22]
    assert job.recover.copied == [3, 6, 9, 12, 15, 18]


def test_a_line_tells_the_means_of_its_window(start):
    job = start()
    engine, batches, losses = Engine(), GlobalBatches(SEQUENCES, 0, 4, 0, 1), []
    for _ in range(8):
        losses.append(float(engine.forward_backward(next(batches), None).loss))
        engine.optimizer_step()
    line = next(line for line in job.recover.run.metrics() if line["step"] == 8)
    assert line["loss"] == pytest.approx(sum(losses[4:]) / 4)
    assert line["grad_norm"] == pytest.approx(sum(losses[4:]) / 2)
    assert (line["lr"], line["epoch"]) == (0.1, 0)
    clock = set(CLOCK) - {"mfu", "padding_share", "counted_share"}  # no peak is known, no padding, no submission
    assert set(line) == {"step", "loss", "grad_norm", "lr", "epoch", "samples", "tokens"} | clock
    assert line["tokens_per_s"] == line["tokens_per_s_per_worker"] > 0
    assert line["memory_peak_bytes"] > 1e6
    assert line["compute_s"] == pytest.approx(line["step_time_s"] - line["data_s"], abs=2e-4)


def test_the_end_must_be_saved_and_the_others_need_not(start):
    assert start().recover.musts == [False, False, False, True]


def test_a_line_is_written_before_the_checkpoint_that_has_it_behind_it(start):
    assert [before[-1] for before in start().recover.lines] == [5, 12, 20, 22]


def test_the_job_around_hears_of_saves_with_their_loss(start):
    job = start()
    assert [step for step, _ in job.run.saves] == [7, 14, 21, 22]
    assert job.run.saves[-1][1]["loss"] == pytest.approx(job.engine.weight)


def test_progress_knows_steps_and_samples(start):
    job = start()
    assert (job.progress.step, job.progress.samples) == (TOTAL, 4 * TOTAL)
    assert job.batches.next_sample == 4 * TOTAL


def test_an_early_stop_is_saved_and_neither_evaluated_nor_logged(start):
    job = start(last_step=13)
    assert job.recover.steps == [7, 13]
    assert [line["step"] for line in lines(job)] == [0, 4, 5, 8, 10, 12]
    assert job.recover.musts == [False, True]


def test_without_an_evaluator_nothing_is_evaluated(start):
    job = start(evaluate=None)
    assert job.engine.evaluated == 0
    assert [line["step"] for line in lines(job)] == [4, 8, 12, 16, 20, 22]


@pytest.mark.parametrize("stop", range(1, TOTAL))
def test_stopping_and_going_on_is_the_run_that_did_not_stop(start, stop):
    whole = start(name="whole")
    start(last_step=stop)
    job = start()
    assert lines(job) == lines(whole)
    assert job.run.began == list(range(stop + 1, TOTAL + 1))
    for step in (7, 14, 21, 22):  # no trace of the stop in any later checkpoint either
        assert start.kept["run"][step] == start.kept["whole"][step]


@pytest.mark.parametrize("death", range(1, TOTAL + 1))
def test_dying_and_going_on_is_the_run_that_did_not_die(start, death):
    whole = start(name="whole")
    start(dies_at=death)
    job = start()
    assert lines(job) == lines(whole)
    assert job.run.began[0] == 1 + (death - 1) // 7 * 7
    assert start.kept["run"] == start.kept["whole"]


def test_many_stops_and_deaths_leave_the_run_as_it_is(start):
    whole = start(name="whole")
    start(dies_at=3)
    start(last_step=9)
    start(dies_at=12)
    start(last_step=10)
    start(dies_at=17)
    assert lines(start()) == lines(whole)


def test_a_finished_run_trains_no_further(start):
    start()
    job = start()
    assert (job.run.began, job.recover.steps) == ([], [])


def test_a_step_that_is_left_out_changes_nothing_but_how_far_the_run_is(start):
    job = start(spoiled=[10])
    engine, batches = Engine(), GlobalBatches(SEQUENCES, 0, 4, 0, 1)
    losses = {}
    for step in range(1, TOTAL + 1):
        batch = next(batches)
        if step != 10:
            losses[step] = float(engine.forward_backward(batch, None).loss)
            engine.optimizer_step()
    assert job.engine.weight == engine.weight
    assert job.progress.samples == 4 * TOTAL
    line = next(line for line in lines(job) if line["step"] == 12)
    assert line["loss"] == pytest.approx((losses[9] + losses[11] + losses[12]) / 3)
    assert [(line["step"], line["skipped"]) for line in lines(job) if "skipped" in line] == [(12, 1)]


def test_a_window_without_a_step_that_counts_has_a_line_without_a_loss(start):
    job = start(spoiled=range(5, 9))
    line = next(line for line in lines(job) if line["step"] == 8)
    assert line == {"step": 8, "lr": 0.1, "epoch": 0, "samples": 32, "tokens": 64, "skipped": 4}


def test_what_is_not_a_number_is_in_no_checkpoint_even_of_the_very_step(start):
    job = start(spoiled=[7, 20, 22])
    assert [metrics.get("loss") for _, metrics in job.run.saves][::3] == [None, None]
    for state in start.kept["run"].values():
        assert "NaN" not in state
        assert "Infinity" not in state


def test_going_back_is_the_run_that_left_the_step_out_and_computes_the_others_again(start):
    skipped = start(name="skipped", spoiled=[10])
    job = start(spoiled=[10], on_bad="rollback")
    assert job.run.began == [*range(1, 11), *range(8, TOTAL + 1)]
    assert start.kept["run"] == start.kept["skipped"]
    assert lines(job) == lines(skipped)


def test_going_back_twice_leaves_both_steps_out(start):
    start(name="skipped", spoiled=[10, 12])
    job = start(spoiled=[10, 14], on_bad="rollback")  # the 14th call is step 12, after going back to 7, without 10
    assert job.run.began == [*range(1, 11), *range(8, 13), *range(8, TOTAL + 1)]
    assert start.kept["run"] == start.kept["skipped"]


def test_with_nothing_to_go_back_to_the_step_is_left_out(start):
    start(name="skipped", spoiled=[3])
    job = start(spoiled=[3], on_bad="rollback")
    assert job.run.began == list(range(1, TOTAL + 1))
    assert start.kept["run"] == start.kept["skipped"]


@pytest.mark.parametrize("death", range(11, TOTAL + 1))
def test_dying_after_a_bad_step_leaves_it_out_again(start, death):
    whole = start(name="whole", spoiled=[10])
    start(dies_at=death, spoiled=[10])
    assert lines(start(known=[10])) == lines(whole)  # the numbers are good this time
    assert start.kept["run"] == start.kept["whole"]


def test_a_step_that_is_known_to_be_bad_is_not_computed(start):
    job = start(known=[10, 11])
    assert job.run.began == list(range(1, TOTAL + 1))
    assert job.engine.calls == TOTAL - 2
    assert (job.engine.schedule, job.batches.next_sample, job.progress.samples) == (TOTAL, 4 * TOTAL, 4 * TOTAL)
    assert lines(job) == lines(start(name="spoiled", spoiled=[10, 11]))
    for step in (14, 21, 22):
        assert start.kept["run"][step] == start.kept["spoiled"][step]


def test_a_step_that_is_known_to_be_bad_leads_nowhere_back(start):
    job = start(known=[10], on_bad="rollback")
    assert job.run.began == list(range(1, TOTAL + 1))


def test_a_bad_step_that_stops_the_run_leaves_what_was_saved(start):
    with pytest.raises(BadStepError, match="step 10"):
        start(spoiled=[10], on_bad="stop")
    assert list(start.kept["run"]) == [7]


def test_an_evaluation_is_the_weighted_mean_of_the_same_batches_each_time():
    engine = Engine()
    batches = GlobalBatches(SEQUENCES, 1, 4, 0, 1)
    weights = [float(next(batches)["input_ids"].sum()) for _ in range(2)]
    expected = sum(w * (0.5 + w) for w in weights) / sum(weights)
    evaluator = Evaluator(engine, lambda: GlobalBatches(SEQUENCES, 1, 4, 0, 1), 2, None)
    assert evaluator.run() == {"held_out_loss": pytest.approx(expected)}
    assert evaluator.run() == evaluator.run()


def test_an_evaluation_lets_go_of_its_batches(monkeypatch):
    closed = []
    monkeypatch.setattr(GlobalBatches, "close", lambda batches: closed.append(batches.next_sample))
    Evaluator(Engine(), lambda: GlobalBatches(SEQUENCES, 1, 4, 0, 1), 2, None).run()
    assert closed == [8]


def test_the_end_lets_go_of_the_batches(start, monkeypatch):
    closed = []
    monkeypatch.setattr(GlobalBatches, "close", lambda batches: closed.append(batches.next_sample))
    start(evaluate=None)
    assert closed == [4 * TOTAL]


def test_the_time_that_counted_goes_with_the_lines_and_other_sinks_and_the_pulse_hear_of_the_run(start, tmp_path):
    heard = []
    start.beside.append(SimpleNamespace(log=lambda step, values: heard.append(step), rewind=heard.append, close=None))
    run = RunDir(LocalStorage(tmp_path / "run"))
    run.storage.ensure()
    run.event("submitted", last_step=TOTAL)
    start(dies_at=17)
    job = start()
    shares = [line["counted_share"] for line in job.recover.run.metrics() if "loss" in line]
    assert len(shares) == 6
    assert all(0 < share <= 1 for share in shares)
    assert heard == [-1, 0, 4, 5, 8, 10, 12, 15, 16, 14, 15, 16, 20, 22]
    assert start.pulses == [*range(1, 17), *range(15, TOTAL + 1)]
