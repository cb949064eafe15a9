"""Pictures of the results of `make bench`: `python -m tests.bench.pictures [FILE] [--into FOLDER]`.

One SVG for each thing that was measured; titles, labels and numbers are those of the file. On white, so that they can
be read beside a dark page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .bounds import BLOCKED, CODE_RUNS, KILLED, PHASES, STALL, goodput_beside, steps_over_time
from .markdown import number, where
from .report import DEFAULT_PATH

OWN, OTHERS = "#1f6feb", ("#8a6d3b", "#7a7a7a", "#b05a5a", "#5a8a6a")
_STANDS_S = 2.0  # between two points of a curve, which is one a second
_WIDTH, _ROW = 7.2, 0.34  # inches: of a picture, of a bar
_PHASE_COLOURS = ("#1f6feb", "#5a96f0", "#94bbf5", "#c3d8f9", "#8a6d3b", "#b89c6a", "#7a7a7a", "#a8a8a8", "#b05a5a",
                  "#cc8f8f", "#5a8a6a", "#93b59f")  # fmt: skip
# Text stays text, which is smaller and can be searched; the same ids and no date: the same results, the same file.
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "areal_ray",
    "font.size": 9,
    "font.family": "sans-serif",
    "path.simplify_threshold": 0.5,
}

Results = Mapping[str, Mapping[str, Any]]


def draw(path: str, folder: str) -> list[str]:
    """Draw every picture for which the file of results has something; the names of the files.

    Args:
        path: of the JSON that `make bench` keeps.
        folder: for the SVGs; it is made.
    """
    results: Results = {result["title"]: result for result in json.loads(Path(path).read_text())["results"]}
    drawn = []
    for name, picture in PICTURES.items():
        with matplotlib.rc_context(_STYLE):
            figure = picture(results)
            if figure is None:
                continue
            Path(folder).mkdir(parents=True, exist_ok=True)
            figure.savefig(Path(folder, f"{name}.svg"), metadata={"Date": None, "Creator": None}, facecolor="white")
        drawn.append(f"{name}.svg")
    return drawn


def steps(results: Results) -> Figure | None:
    """Finished steps over time under the same kills, beside each peer that there is."""
    beside = [peer for peer in ("tutorial", "torchrun-dcp") if steps_over_time(goodput_beside(peer)) in results]
    if not beside:
        return None
    figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
    for axes, peer in zip(figure.subplots(1, len(beside), squeeze=False, sharey=True)[0], beside, strict=True):
        result = results[steps_over_time(goodput_beside(peer))]
        for mark in result["marks"]:
            axes.axvline(mark, color="#d0342c", linewidth=0.8, linestyle=":")
        for arm, points in result["curves"].items():
            axes.plot(*zip(*_standing(points), strict=True), label=arm, color=_colour(arm, 0), linewidth=1.6)
        axes.set(xlabel="seconds (dotted: a worker is killed)", ylim=(0, None), xlim=(0, None))
        axes.legend(frameon=False, loc="upper left")
        _plain(axes)
    figure.axes[0].set_ylabel("finished steps that count")
    return _signed(figure, "finished steps under the same kills", result)


def saves(results: Results) -> Figure | None:
    """What a save blocks, and what it costs in the end."""
    shown = [results[title] for title in (BLOCKED, STALL) if title in results]
    if not shown:
        return None
    rows = max(len(result["arms"]) for result in shown)
    figure = Figure(figsize=(_WIDTH, 1.2 + _ROW * rows), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _bars(axes, {arm: row["median"] for arm, row in result["arms"].items()})
        axes.set_title(result["title"].partition(":")[0], fontsize=9)
        axes.set_xlabel("seconds, median")
    return _signed(figure, "what a save costs", shown[0])


def restart(results: Results) -> Figure | None:
    """How the time from a kill to the next finished step splits, for every arm, and in phases for areal_ray."""
    if KILLED not in results:
        return None
    arms, code = results[KILLED]["arms"], results.get(CODE_RUNS, {}).get("arms", {})
    phases = results.get(PHASES, {}).get("figures", {})
    figure = Figure(figsize=(_WIDTH, 1.2 + _ROW * len(arms) + (1.8 if phases else 0)), layout="constrained")
    rows = figure.subplots(2 if phases else 1, 1, squeeze=False, height_ratios=[2, 1][: 2 if phases else 1])[:, 0]
    until = {arm: code[arm]["median"] if arm in code else 0.0 for arm in arms}
    rest = [row["median"] - until[arm] for arm, row in arms.items()]
    if code:
        rows[0].barh(list(arms), list(until.values()), color="#9aa5b1", label="until the training code runs again")
    then = "from there on" if code else "until a step is finished"
    rows[0].barh(list(arms), rest, left=list(until.values()), color=OWN, label=then)
    for arm, row in arms.items():
        rows[0].annotate(f" {number(row['median'])} s", (row["median"], arm), va="center")
    rows[0].margins(x=0.12)
    rows[0].legend(frameon=False, loc="lower right")
    if phases:
        _stack(rows[1], {name: value for name, value in phases.items() if value > 0.0005})
    for axes in rows:
        axes.invert_yaxis()
        _plain(axes)
    rows[-1].set_xlabel("seconds from SIGKILL of a worker, medians")
    return _signed(figure, "from a kill to the next finished step", results[KILLED])


PICTURES: dict[str, Callable[[Results], Figure | None]] = {"steps": steps, "saves": saves, "restart": restart}


def _standing(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """A curve that stays where it is while nothing is reached, and does not rise through a restart."""
    shown = [(points[0][0], points[0][1])]
    for at, reached in points[1:]:
        if at - shown[-1][0] > _STANDS_S:
            shown.append((at, shown[-1][1]))
        shown.append((at, reached))
    return shown


def _stack(axes: Axes, phases: Mapping[str, float]) -> None:
    at = 0.0
    for colour, (name, seconds) in zip(_PHASE_COLOURS, phases.items(), strict=False):
        label = f"{name.removesuffix('_s').replace('_', ' ')} {number(seconds)}"
        axes.barh(["areal_ray"], [seconds], left=[at], color=colour, label=label)
        at += seconds
    axes.legend(frameon=False, ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.8))


def _bars(axes: Axes, values: Mapping[str, float]) -> None:
    names = list(values)
    colours = [_colour(name, i) for i, name in enumerate(names)]
    axes.barh(names, list(values.values()), color=colours)
    for name, value in values.items():
        axes.annotate(f" {number(value)}", (max(value, 0.0), name), va="center")
    axes.margins(x=0.18)
    axes.invert_yaxis()
    _plain(axes)


def _colour(arm: str, place: int) -> str:
    return OWN if arm.startswith("areal_ray") else OTHERS[place % len(OTHERS)]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _signed(figure: Figure, title: str, result: Mapping[str, Any]) -> Figure:
    """With what it shows, and the machine and the day that the figures belong to."""
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.supxlabel(where(result), fontsize=6, color="#555555")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default=DEFAULT_PATH, help="JSON of `make bench`")
    parser.add_argument(
        "--into", default=str(Path(__file__).with_name("drawn")), metavar="FOLDER", help="default: those of the README"
    )
    given = parser.parse_args(arguments)
    print("\n".join(draw(given.file, given.into)) or "nothing to draw a picture of")


if __name__ == "__main__":
    main()
