"""Gauges of Ray, and the dashboard that shows them."""

import json
import re
from pathlib import Path

import pytest

from areal_ray.run.metric_names import RESERVED
from areal_ray.worker import ray_metrics

pytestmark = pytest.mark.unit
DASHBOARD = Path(__file__).parents[3] / "conf" / "grafana" / "areal_ray.json"
VALUES = {"loss": 1.5, "data_s": 0.25, "step_time_s": 2.0, "data/code/epoch": 3}


@pytest.fixture
def exported(monkeypatch):
    """What Ray exports: by name and labels."""
    found = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name)
            self.name, self.tag_keys = name, tag_keys

        def set(self, value, tags):
            assert tuple(tags) == self.tag_keys
            found[f"ray_{self.name}", *tags.values()] = value

    monkeypatch.setattr(ray_metrics, "Gauge", Gauge)
    return found


def test_rank_zero_tells_of_the_run_and_every_rank_of_itself(exported):
    for rank in (0, 1):
        ray_metrics.RayMetrics("mine", rank, lambda rank=rank: 100 + rank).log(7, {**VALUES, "data_s": 0.25 + rank})
    of_the_run = {"step": 7, "loss": 1.5, "data_s": 0.25, "step_time_s": 2.0, "data_code_epoch": 3}
    of_workers = {("memory_peak_bytes", rank): 100 + rank for rank in (0, 1)}
    of_workers |= {("data_s", rank): 0.25 + rank for rank in (0, 1)} | {("step_time_s", rank): 2.0 for rank in (0, 1)}
    assert exported == {
        **{(f"ray_areal_ray_{name}", "mine"): value for name, value in of_the_run.items()},
        **{(f"ray_areal_ray_worker_{name}", "mine", str(rank)): value for (name, rank), value in of_workers.items()},
    }


def test_the_dashboard_shows_every_metric_that_there_is_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {re.search(r"ray_areal_ray_(\w+)", query)[1] for query in queries}
    workers = {"worker_memory_peak_bytes", "worker_data_s", "worker_step_time_s"}
    assert shown == {*RESERVED, *workers, "held_out_loss"} - {"time", "memory_peak_rank"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
