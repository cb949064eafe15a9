"""Runs seen from outside: the report, lists, two side by side."""

import json
import re

import pytest

from areal_ray.cli.main import main as run_cli
from areal_ray.config import dump, load
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.report import page, read_course
from areal_ray.tools.runs import compare, list_runs

pytestmark = pytest.mark.unit


class Written:
    """A run directory, written as a run does it."""

    def __init__(self, folder, name, *overrides):
        self.run = RunDir(LocalStorage(folder / name))
        self.run.storage.ensure()
        config = load("conf/experiments/tiny.yaml", [f"run.storage_path={folder}", f"run.name={name}", *overrides])
        self.run.write_config("# git revision: abc1234\n" + dump(config))
        self.attempt = 0

    def start(self, step, workers=2):
        self.attempt += 1
        self.run.event("attempt", attempt=self.attempt, world_size=workers, nodes=["here", "there"][:workers], pids=[])
        fields = {"attempt": self.attempt, "step": step, "reached": step}
        self.run.event("restored" if step else "started", **fields)
        self.run.event("training", attempt=self.attempt, step=step + 1, build_s=0.2, load_s=0.1, first_step_s=0.5)

    def train(self, after, to, every=10):
        for step in range(after + every, to + 1, every):
            values = {"loss": 5.0 - step / 100, "grad_norm": 1.0, "lr": 1e-3, "epoch": 0, "distance": 2.0}
            held_out = {"held_out_loss": 5.1 - step / 100} if step % 50 == 0 else {}
            self.run.log_metrics(step, {**values, "tokens_per_s": 1000.0, "step_time_s": 0.5, **held_out})
        times = {"blocked_s": 0.01, "waited_s": 0.0, "total_s": 0.1}
        self.run.event("saved", attempt=self.attempt, step=to, checkpoint=f"step-{to:08}.a1", bytes=1000, **times)


@pytest.fixture
def runs(tmp_path):
    whole = Written(tmp_path, "whole")
    whole.run.event("submitted", last_step=200, submission="a")
    whole.start(0)
    whole.train(0, 200)
    whole.run.event("finished", step=200)

    killed = Written(tmp_path, "killed", "optim.lr=0.5", "run.s3.secret_key=plugh7", "run.s3.access_key=k")
    killed.run.event("submitted", last_step=200, submission="b")
    killed.start(0)
    killed.train(0, 100)
    told = {"rank": 1, "cause": "the worker process died", "error": "</script><b>SIGKILL</b>", "where": "mine.py:7"}
    killed.run.event("failure", **told, step=105, detection_s=0.1, ranks=[0, 1])
    killed.start(100, workers=1)
    killed.run.event("deleted", checkpoint="step-00000100.a1")
    killed.train(100, 150)
    killed.run.event("failed", cause="out of memory", error="no room")
    return tmp_path, whole, killed


def figures(text):
    return json.loads(re.search(r'id="charts">(.*?)</script>', text, re.S)[1])


def test_the_report_has_curves_restarts_checkpoints_failures_and_what_differs(runs):
    _, _, killed = runs
    text = page([read_course(killed.run)])
    found = {trace["name"]: trace for figure in figures(text) for trace in figure["traces"]}
    assert found["loss"]["x"] == list(range(10, 151, 10))
    assert found["held-out loss"]["x"] == [50, 100, 150]
    assert found["restarts"]["x"] == [100]
    assert "2 → 1 workers, after: worker 1: the worker process died" in found["restarts"]["text"][0]
    assert found["until durable"]["x"] == [100, 150]
    assert found["first step"]["x"] == [0.5, 0.5]
    assert "optim.lr" in text
    assert "abc1234" in text
    for part in ("rank 1 on there", "mine.py:7", "out of memory no room", "&lt;/script&gt;&lt;b&gt;SIGKILL"):
        assert part in text


def test_the_report_needs_nothing_from_elsewhere_and_shows_no_secret(runs):
    _, _, killed = runs
    text = page([read_course(killed.run)])
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.findall(r"(?:src|href)=", own)
    assert "default-src 'none'" in own
    assert "</script><b>" not in text
    assert "plugh7" not in text


def test_runs_are_laid_over_each_other(runs):
    _, whole, killed = runs
    text = page([read_course(whole.run), read_course(killed.run)])
    loss = figures(text)[0]["traces"]
    colours = {trace["name"]: trace.get("line", trace.get("marker"))["color"] for trace in loss}
    assert colours["whole: loss"] == colours["whole: held-out loss"] != colours["killed: loss"]
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert {"Loss", "Throughput", "Distance", "What went wrong (killed)"} <= set(titles)


def test_a_long_run_is_sampled_and_keeps_its_evaluations_and_its_end(tmp_path):
    run = RunDir(LocalStorage(tmp_path))
    lines = [json.dumps({"step": step, "loss": 1.0} | ({"held_out_loss": 2.0} if step == 777 else {})) + "\n"
             for step in range(1, 123_458)]  # fmt: skip
    run.storage.append("metrics.jsonl", "".join(lines).encode())
    steps = [line["step"] for line in run.sampled_metrics(4000)]
    assert steps == sorted({*range(100, 123_458, 100), 777, 123_457})


def test_the_list_says_what_became_of_each(runs, capsys):
    folder, whole, killed = runs
    rows = {row.name: row for row in list_runs(LocalStorage(folder))}
    assert (rows["whole"].status, rows["whole"].step, rows["whole"].steps) == ("finished", 200, 200)
    assert (rows["killed"].status, rows["killed"].restarts, rows["killed"].bytes) == ("failed", 1, 1000)
    assert rows["killed"].held_out_loss == 5.1 - 1.5
    whole.run.event("stopped", step=205)  # between two lines of metrics
    assert {row.name: row.step for row in list_runs(LocalStorage(folder))} == {"whole": 205, "killed": 150}
    whole.run.event("finished", step=200)
    killed.run.event("submitted", last_step=200, submission="c")
    assert {row.name: row.status for row in list_runs(LocalStorage(folder))}["killed"] == "gone"
    killed.run.storage.replace("driver.json", json.dumps({"id": "x", "host": "elsewhere", "time": 4e9}).encode())
    assert {row.name: row.status for row in list_runs(LocalStorage(folder))}["killed"] == "running"
    assert run_cli(["runs", str(folder)]) == 0
    assert re.search(r"^whole +finished +200 of 200 +3\.0000 +3\.1000 +0 .* 1 kB$", capsys.readouterr().out, re.M)


def test_two_are_compared_by_what_differs(runs, capsys):
    folder, whole, killed = runs
    rows = {key: values for key, *values in compare(read_course(whole.run), read_course(killed.run))}
    assert rows["optim.lr"] == [0.002, 0.5]
    assert rows["step"] == [200, 150]
    assert "optim.eps" not in rows
    assert "distance" not in rows
    (folder / "it-sweep").mkdir()
    trials = {f"it-{name}": {"run": name} for name in ("whole", "killed", "not-begun")}
    (folder / "it-sweep" / "sweep.json").write_text(json.dumps({"trials": trials}))
    assert run_cli(["compare", str(folder / "it-sweep")]) == 0
    assert re.search(r"^optim\.lr +0\.002 +0\.5$", capsys.readouterr().out, re.M)
    assert run_cli(["compare", str(folder / "whole")]) == 1
    assert "is not the folder of a sweep; of runs there must be two or more" in capsys.readouterr().err
    assert run_cli(["compare", str(folder / "whole"), str(folder / "killed"), str(folder / "whole")]) == 0
    assert capsys.readouterr().out.split()[:3] == ["whole", "killed", "whole"]
    places = [str(folder / name) for name in ("whole", "killed", "whole")]
    assert run_cli(["compare", "--json", *places]) == 0
    assert {"key": "step", places[0]: 200, places[1]: 150} in json.loads(capsys.readouterr().out)
    assert run_cli(["compare", str(folder / "whole"), str(folder / "killed")]) == 0
    assert re.search(r"^optim\.lr +0\.002 +0\.5$", capsys.readouterr().out, re.M)


def test_the_commands_write_follow_and_refuse(runs, capsys):
    folder, _, _ = runs
    assert run_cli(["report", str(folder / "killed"), str(folder / "whole")]) == 0
    assert capsys.readouterr().out == f"{folder}/killed/report.html\n"
    assert (folder / "killed" / "report.html").stat().st_size > 1_000_000
    assert run_cli(["watch", str(folder / "whole")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("step  10/200  loss 4.9000")
    assert shown[-1] == "whole: finished at step 200"
    assert run_cli(["report", str(folder / "nothing")]) == 1
    assert capsys.readouterr().err == f"areal-ray: {folder}/nothing: there is no run\n"
