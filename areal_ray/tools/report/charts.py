"""Charts of runs, as Plotly figures (JSON): one or several runs laid over each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from areal_ray.run.goodput import PHASES
from areal_ray.run.metric_names import RESERVED
from areal_ray.tools.report.course import Course

# Okabe and Ito's colours, told apart by people with any kind of colour vision; black and yellow are left out, as each
# is lost on one of the two backgrounds. https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")  # on paper without colours
_PARTS = ("data_s", "save_s", "evaluation_s")
_OWN_CHARTS = 8


@dataclass(frozen=True)
class Chart:
    """One figure.

    Args:
        title: above it.
        traces, layout: as Plotly takes them.
        about: a sentence below it, if it needs one.
    """

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    about: str = ""


def charts(runs: Sequence[Course]) -> list[Chart]:
    """The charts for which there are numbers."""
    made = [_loss(runs), _throughput(runs), _lines(runs, "mfu", "Share of the device's peak (MFU)", axis="share")]
    made += [_parts(run) for run in runs] if len(runs) == 1 else []
    made += [_lines(runs, "grad_norm", "Gradient norm", log=True), _lines(runs, "lr", "Learning rate")]
    made += [_lines(runs, "memory_peak_bytes", "Memory of the worker that takes most", axis="bytes")]
    names = {name for run in runs for line in run.metrics for name in line}
    own = sorted(name for name in names - set(RESERVED) if name != "held_out_loss")
    made += [_lines(runs, name, name.replace("_", " ").capitalize()) for name in own[:_OWN_CHARTS]]
    made += [_checkpoints(runs), *(_starts(run) for run in runs)]
    return [chart for chart in made if chart.traces]


def _loss(runs: Sequence[Course]) -> Chart:
    traces, shapes = [], []
    for i, run in enumerate(runs):
        name = f"{run.name}: " if len(runs) > 1 else ""
        traces += _trace(run, "loss", f"{name}loss", i, line={"width": 1.5, "dash": _DASHES[i % len(_DASHES)]})
        held_out = _trace(run, "held_out_loss", f"{name}held-out loss", i if len(runs) > 1 else 1)
        traces += [{**trace, "mode": "lines+markers", "marker": {"size": 7, "symbol": "diamond"}} for trace in held_out]
        events, lines = _disturbances(run, i, name)
        traces += events
        shapes += lines if len(runs) == 1 else []
    about = (
        "Marks at the bottom: where workers were started again, in what number, and why."
        if any(trace.get("name", "").endswith("restarts") for trace in traces)
        else ""
    )
    return Chart("Loss", traces, {"xaxis": {"title": "step"}, "yaxis": {"title": "loss"}, "shapes": shapes}, about)


def _trace(run: Course, metric: str, name: str, i: int, **style: Any) -> list[dict[str, Any]]:
    points = [(line["step"], line[metric]) for line in run.metrics if _number(line.get(metric))]
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    line = {"color": COLOURS[i % len(COLOURS)], **style.pop("line", {"width": 1.5})}
    return [{"type": "scatter", "mode": "lines", "name": name, "x": xs, "y": ys, "line": line, **style}]


def _disturbances(run: Course, i: int, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Marks and lines where the workers of a run were started again, or went back."""
    marks: list[tuple[int, str, str]] = []
    workers: dict[int, Any] = {event["attempt"]: event.get("world_size") for event in run.of("attempt")}
    reasons = {entry["attempt"]: entry["after"] for entry in run.account["attempts"]}
    before: Any = None
    for event in run.of("started", "restored"):
        attempt, now = event["attempt"], workers.get(event["attempt"])
        if before is not None:
            resized = now != before
            what = f"{before} → {now} workers" if resized else f"{now} workers"
            marks.append((event["step"], "resize" if resized else "restart", f"{what}, after: {reasons.get(attempt)}"))
        before = now
    marks += [
        (event["step"], "rollback" if event.get("action") == "rollback" else "left out", event.get("reason", ""))
        for event in run.of("bad_step")
    ]
    if not marks:
        return [], []
    losses = [line["loss"] for line in run.metrics if _number(line.get("loss"))]
    floor = min(losses, default=0.0)
    symbols = {"restart": "triangle-up", "resize": "square", "rollback": "triangle-left", "left out": "x"}
    colour = COLOURS[i % len(COLOURS)] if name else COLOURS[1]
    trace = {
        "type": "scatter", "mode": "markers", "name": f"{name}restarts",
        "x": [step for step, _, _ in marks], "y": [floor] * len(marks),
        "marker": {"symbol": [symbols[kind] for _, kind, _ in marks], "size": 11, "color": colour},
        "text": [f"step {step}: {kind}<br>{_plain(why)}" for step, kind, why in marks], "hoverinfo": "text",
    }  # fmt: skip
    dashed = {"color": colour, "width": 1, "dash": "dot"}
    shapes = [
        {"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": dashed, "opacity": 0.5}
        for step, _, _ in marks
    ]
    return [trace], shapes


def _throughput(runs: Sequence[Course]) -> Chart:
    return _lines(runs, "tokens_per_s", "Throughput", axis="tokens/s")


def _lines(runs: Sequence[Course], metric: str, title: str, axis: str = "", log: bool = False) -> Chart:
    traces = []
    for i, run in enumerate(runs):
        traces += _trace(run, metric, run.name, i, line={"width": 1.5, "dash": _DASHES[i % len(_DASHES)]})
    positive = log and all(y > 0 for trace in traces for y in trace["y"])
    y = {"title": axis or title.lower(), "rangemode": "normal" if positive else "tozero", "exponentformat": "e"}
    layout = {"xaxis": {"title": "step"}, "yaxis": {**y, **({"type": "log"} if positive else {})}}
    return Chart(title, traces, {**layout, "showlegend": len(runs) > 1})


def _parts(run: Course) -> Chart:
    """The time of a step, split, where it was measured."""
    lines = [line for line in run.metrics if _number(line.get("step_time_s")) and any(p in line for p in _PARTS)]
    if not lines:
        return Chart("", [], {})
    parts = {name: [line.get(name, 0.0) for line in lines] for name in _PARTS}
    within = [line["step_time_s"] - line.get("data_s", 0.0) for line in lines]
    rows = {"compute": within, "data": parts["data_s"], "saves": parts["save_s"], "evaluation": parts["evaluation_s"]}
    traces = [
        {"type": "scatter", "mode": "lines", "stackgroup": "time", "name": name, "x": [line["step"] for line in lines],
         "y": values, "line": {"width": 0.5, "color": COLOURS[i % len(COLOURS)]}}
        for i, (name, values) in enumerate(rows.items()) if any(values)
    ]  # fmt: skip
    return Chart("Where a step's time goes", traces, {"xaxis": {"title": "step"}, "yaxis": {"title": "seconds a step"}})


def _checkpoints(runs: Sequence[Course]) -> Chart:
    traces: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        saves = run.of("saved")
        if not saves:
            continue
        name = f"{run.name}: " if len(runs) > 1 else ""
        about = [f"{save['checkpoint']}<br>{save['bytes'] / 1e6:,.1f} MB" for save in saves]
        for j, (key, what) in enumerate((("total_s", "until durable"), ("blocked_s", "training blocked"))):
            colour = COLOURS[(2 * i + j) % len(COLOURS)]
            traces.append(
                {"type": "scatter", "mode": "markers", "name": f"{name}{what}", "x": [save["step"] for save in saves],
                 "y": [max(save[key], 1e-4) for save in saves], "text": about,
                 "marker": {"size": 7, "symbol": ("circle", "cross")[j], "color": colour}}
            )  # fmt: skip
    layout = {"xaxis": {"title": "step"}, "yaxis": {"title": "seconds", "type": "log"}}
    return Chart("Checkpoints, and what each cost", traces, layout)


def _starts(run: Course) -> Chart:
    """The account of every start as stacked bars."""
    entries = run.account["attempts"]
    labels = [f"{entry['attempt']}: after {_plain(entry['after'])[:40]}" for entry in entries]
    traces = [
        {"type": "bar", "orientation": "h", "name": name.removesuffix("_s").replace("_", " "), "y": labels,
         "x": [entry.get(name, 0.0) for entry in entries],
         "marker": {"color": COLOURS[i % len(COLOURS)], "pattern": {"shape": ("", "/", "x")[i // len(COLOURS) % 3]}}}
        for i, name in enumerate(PHASES) if any(entry.get(name) for entry in entries)
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "xaxis": {"title": "seconds"},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "height": 160 + 28 * len(labels),
    }
    return Chart(f"Where starts took their time ({run.name})", traces, layout)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(text: Any) -> str:
    """Text that Plotly does not take for markup."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
