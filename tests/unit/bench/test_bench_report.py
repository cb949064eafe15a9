"""The report of make bench: medians, paired ratios, promises, the file that it keeps, Markdown."""

import json

import pytest

from tests.bench import bounds, markdown, report

pytestmark = pytest.mark.unit

ABOUT = {"machine": "2 cores (a CPU), 24 GiB", "date": "2026-01-02", "revision": "abc", "versions": {"torch": "2.13"}}


def table(title: str, paired: bool = True, **rows: list[float]) -> dict:
    return report.show(title, "s", rows, next(iter(rows)), paired=paired)


def test_ratios_are_of_the_same_round():
    result = table("t", other=[1.0, 10.0, 100.0], mine=[2.0, 10.0, 50.0])
    assert result["arms"]["mine"]["values"] == [2.0, 10.0, 50.0]
    assert (result["arms"]["mine"]["median"], result["arms"]["mine"]["ratio"]) == (10.0, 1.0)
    assert (result["arms"]["mine"]["ratio_min"], result["arms"]["mine"]["ratio_max"]) == (0.5, 2.0)
    assert result["noise"] == [10.0, 10.0]


def test_ratios_of_what_may_be_less_than_nothing_are_of_the_medians():
    result = table("t", paired=False, other=[-1.0, 4.0, 5.0], mine=[1.0, 2.0, -8.0])
    assert result["arms"]["mine"]["ratio"] == 0.25
    assert result["noise"] == []
    assert table("t", paired=False, other=[-1.0], mine=[1.0])["arms"]["mine"]["ratio"] is None


@pytest.mark.parametrize(("mine", "verdict"), [(6.0, "met"), (6.1, "NOT met")])
def test_a_promise_is_kept_up_to_its_limit(mine, verdict):
    (line,) = bounds.judge([table(bounds.START, tutorial=[10.0], areal_ray=[mine])])
    assert line.startswith("  start, areal_ray / tutorial")
    assert line.endswith(f"<= 0.6    {verdict}")


def test_nothing_is_said_of_what_was_not_measured():
    assert bounds.judge([table(bounds.START, tutorial=[10.0], torchrun=[1.0])]) == []


def test_each_promise_is_about_another_measurement():
    assert len({(bound.what, bound.title) for bound in bounds.BOUNDS}) == len(bounds.BOUNDS)


def test_results_of_one_revision_are_kept_together(tmp_path):
    path = str(tmp_path / "bench.json")
    report.write(path, [table("one", a=[1.0])], ABOUT)
    report.write(path, [table("two", a=[1.0])], ABOUT)
    report.write(path, [table("one", a=[2.0])], ABOUT | {"date": "2026-01-03"})
    kept = {result["title"]: result for result in json.loads((tmp_path / "bench.json").read_text())["results"]}
    assert {title: result["context"]["date"] for title, result in kept.items()} == {
        "one": "2026-01-03",
        "two": "2026-01-02",
    }
    report.write(path, [table("three", a=[1.0])], ABOUT | {"revision": "def"})
    assert [result["title"] for result in json.loads((tmp_path / "bench.json").read_text())["results"]] == ["three"]


def test_markdown():
    results = [
        {**table("first", other=[1000.0, 3000.0], mine=[500.0, 750.0]), "context": ABOUT},
        {**table("second", other=[0.0213]), "context": ABOUT},
        {**report.figures("sizes", bytes=12.34), "context": ABOUT | {"date": "2026-01-03"}},
    ]
    assert markdown.tables(results) == "\n".join(
        [
            "2 cores (a CPU), 24 GiB; torch 2.13; 2026-01-02",
            "",
            "| measured | arm | median (min to max) | n | ratio (min to max) |",
            "|---|---|---|---|---|",
            "| first (s, lower is better) | other | 2,000 (1,000 to 3,000) | 2 | 1 |",
            "|  | mine | 625 (500 to 750) | 2 | 0.375 (0.250 to 0.500) |",
            "| | other against itself | | | 3.000 to 3.000 |",
            "| second (s, lower is better) | other | 0.021 | 1 | 1 |",
            "",
            "2 cores (a CPU), 24 GiB; torch 2.13; 2026-01-03",
            "",
            "| measured | arm | median (min to max) | n | ratio (min to max) |",
            "|---|---|---|---|---|",
            "| sizes | bytes | 12.3 | | |",
        ]
    )
