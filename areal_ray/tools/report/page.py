"""The report as one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from areal_ray.run.goodput import PHASES
from areal_ray.run.units import size_text, span_text
from areal_ray.tools.report.charts import COLOURS, charts
from areal_ray.tools.report.course import Course

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def page(runs: Sequence[Course]) -> str:
    """The report of one run, or of several laid over each other.

    About 5 MB, nearly all of it Plotly's.
    """
    shown = charts(runs)
    figures = [
        f'<figure><h2>{_text(chart.title)}</h2><div class="chart" id="chart-{i}"></div>'
        f"<figcaption>{_text(chart.about)}</figcaption></figure>"
        for i, chart in enumerate(shown)
    ]
    data = json.dumps([{"traces": chart.traces, "layout": chart.layout} for chart in shown])
    title = ", ".join(run.name for run in runs)
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<div class="runs">{"".join(_card(run, i) for i, run in enumerate(runs))}</div>',
        *(_failures(run) for run in runs),
        *figures,
        *(_starts(run) for run in runs),
        *(_config(run) for run in runs),
    ]
    own = resources.files("areal_ray.tools.report")
    # "</" would end the script, whatever stands before it.
    safe = data.replace("</", "<\\/")
    plotly = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{own.joinpath('page.css').read_text()}</style></head><body>{''.join(parts)}\n"
        f'<script type="application/json" id="charts">{safe}</script>'
        f"<script>{plotly}</script><script>{own.joinpath('page.js').read_text()}</script></body></html>\n"
    )


def _card(run: Course, i: int) -> str:
    account, steps = run.account, run.steps
    rows = [("step", f"{run.step:,}" + (f" of {steps:,}" if steps else ""))]
    for name in ("loss", "held_out_loss"):
        value = run.last(name)
        rows += [(name.replace("_", " ").replace("held out", "held-out"), f"{value:.4f}")] if value is not None else []
    rows += [(name.replace("_", " "), f"{value:,.0f}") for name in ("tokens_per_s",) if (value := run.last(name))]
    rows += [("MFU", f"{mfu:.1%}")] if (mfu := run.last("mfu")) is not None else []
    rows += [("memory of a worker", size_text(peak))] if (peak := run.last("memory_peak_bytes")) is not None else []
    rows += [
        ("restarts", str(run.result.get("restarts", max(0, len(account["attempts"]) - 1)))),
        ("lost steps", str(account["lost_steps"])),
        ("time", span_text(account["wall_s"])),
    ]
    rows += [("in steps that count", f"{account['share']:.0%}")] if account["share"] is not None else []
    info = run.checkpoint
    rows += [("checkpoint", info["name"])] if info else []
    rows += [(f"{name} of", str(info[name])) for name in ("device",) if info.get(name)]
    versions = info.get("versions") or {}
    rows += [(name, str(version)) for name, version in versions.items()]
    rows += [("data", str(info["data"]))] if info.get("data") else []
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    swatch = f'<span class="swatch" style="background:{COLOURS[i % len(COLOURS)]}"></span>'
    head = f'<h3>{swatch}{_text(run.name)} <span class="{_text(run.status)}">{_text(run.status)}</span></h3>'
    return f'<section class="run">{head}<dl>{items}</dl><p><code>{_text(run.location)}</code></p></section>'


def _failures(run: Course) -> str:
    """What went wrong, the newest first."""
    nodes: list[str] = []
    rows = []
    for event in run.events:
        if event["event"] == "attempt":
            nodes = event.get("nodes", [])
        if event["event"] == "failure":
            rank = event.get("rank")
            node = nodes[rank] if isinstance(rank, int) and rank < len(nodes) else ""
            what = f"{event.get('cause', '')}: {event.get('error', '')}"
            where = f"rank {rank}" + (f" on {node}" if node else "")
            rows.append((event.get("step"), where, what, event.get("where", "")))
        elif event["event"] in ("save_failed", "bad_step", "passed_over", "bad_device", "failed", "controller_died"):
            what = " ".join(str(event.get(name, "")) for name in ("cause", "error", "reason", "checkpoint")).strip()
            rows.append((event.get("step"), event["event"].replace("_", " "), what, ""))
    if not rows:
        return ""
    body = [
        [(_step(step), "number"), (who, ""), (what[:500], "long"), (at, "long")] for step, who, what, at in rows[::-1]
    ]
    heads = [("step", "number"), ("where", ""), ("what", ""), ("in your code", "")]
    return _section(f"What went wrong ({run.name})", _table(heads, body[:100]))


def _starts(run: Course) -> str:
    entries = run.account["attempts"]
    phases = [name for name in PHASES if any(name in entry for entry in entries)]
    heads = [
        ("attempt", "number"),
        ("after", ""),
        *((n.removesuffix("_s").replace("_", " "), "number") for n in phases),
    ]
    body = []
    for entry in entries[-100:]:
        seconds = [(f"{entry[name]:.1f}" if name in entry else "-", "number") for name in phases]
        lost = "-" if entry["lost_steps"] is None else str(entry["lost_steps"])
        body.append([(str(entry["attempt"]), "number"), (entry["after"], "long"), *seconds, (lost, "number")])
    table = _table([*heads, ("lost steps", "number")], body)
    return _section(f"Every start, in seconds ({run.name})", table, folded=True)


def _config(run: Course) -> str:
    body = [[(key, ""), (json.dumps(value), "long")] for key, value in run.differs.items()]
    notes = "".join(f"<p><code>{_text(note)}</code></p>" for note in run.notes)
    return _section(f"Configuration that differs from the defaults ({run.name})", notes + _table([], body), folded=True)


def _section(title: str, content: str, folded: bool = False) -> str:
    if folded:
        return f"<section><h2>{_text(title)}</h2><details><summary>show</summary>{content}</details></section>"
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _table(heads: list[tuple[str, str]], rows: list[list[tuple[str, str]]]) -> str:
    def row(cells: list[tuple[str, str]], tag: str) -> str:
        inner = (f'<{tag} class="{kind}">{_text(text)}</{tag}>' for text, kind in cells)
        return f"<tr>{''.join(inner)}</tr>"

    head = f"<thead>{row(heads, 'th')}</thead>" if heads else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _step(step: Any) -> str:
    return f"{step:,}" if isinstance(step, int) else "-"


def _text(value: str) -> str:
    return html.escape(value)
