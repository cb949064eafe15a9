"""Pictures of what make bench measured: every series is in them, and nothing of the machine but what it says itself."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra areal_ray[bench]")

from tests.bench import bounds, pictures, report

pytestmark = pytest.mark.unit
ABOUT = {"machine": "2 cores (a CPU), 24 GiB", "date": "2026-01-02", "revision": "abc", "versions": {"torch": "2.13"}}


def table(title, **rows):
    return report.show(title, "s", rows, "tutorial")


@pytest.fixture
def results(tmp_path):
    ours = {"areal_ray": [(0.0, 0), (5.0, 12), (9.0, 30)]}
    beside = {peer: {peer: [(0.0, 0), (9.0, 20)], **ours} for peer in ("tutorial", "torchrun-dcp")}
    made = [
        *(
            report.curves(bounds.steps_over_time(bounds.goodput_beside(peer)), curves, [3.0])
            for peer, curves in beside.items()
        ),
        table(bounds.BLOCKED, tutorial=[0.4, 0.5], areal_ray=[0.02, 0.03]),
        table(bounds.STALL, tutorial=[0.6], areal_ray=[-0.1]),
        table(bounds.KILLED, tutorial=[8.0], areal_ray=[1.2]),
        table(bounds.CODE_RUNS, tutorial=[6.0], areal_ray=[0.7]),
        report.figures(bounds.PHASES, detection_s=0.1, load_s=0.25, wait_s=0.0),
    ]
    path = tmp_path / "bench.json"
    report.write(str(path), made, ABOUT)
    return path


def texts(path):
    root = ElementTree.fromstring(path.read_text())
    return {text.strip() for element in root.iter() for text in [element.text or ""] if text.strip()}


def test_each_picture_has_its_series_and_numbers_and_no_path(results, tmp_path):
    folder = tmp_path / "drawn"
    assert pictures.draw(str(results), str(folder)) == ["steps.svg", "saves.svg", "restart.svg"]
    said = {name: texts(folder / f"{name}.svg") for name in pictures.PICTURES}
    assert {"tutorial", "torchrun-dcp", "areal_ray"} <= said["steps"]
    assert {"tutorial", "areal_ray", "0.450", "0.025", "-0.100"} <= said["saves"]
    assert {"tutorial", "areal_ray", "8.00 s", "1.20 s", "detection 0.100", "load 0.250"} <= said["restart"]
    for name in pictures.PICTURES:
        assert any("2 cores (a CPU), 24 GiB" in text for text in said[name])
        text = (folder / f"{name}.svg").read_text()
        assert len(text) < 40_000
        assert not [path for path in ("/home", "/root", "/work", str(tmp_path)) if path in text]


def test_the_same_results_give_the_same_files_and_what_is_missing_is_left_out(results, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        pictures.draw(str(results), str(folder))
    assert (one / "saves.svg").read_bytes() == (other / "saves.svg").read_bytes()
    kept = json.loads(results.read_text())
    kept["results"] = [each for each in kept["results"] if each["title"] == bounds.BLOCKED]
    results.write_text(json.dumps(kept))
    assert pictures.draw(str(results), str(tmp_path / "few")) == ["saves.svg"]
