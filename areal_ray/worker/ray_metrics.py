"""Metrics of a run among those of its Ray cluster, for Prometheus and Grafana (conf/grafana/)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ray.util.metrics import Gauge

_PREFIX = "areal_ray_"  # Ray puts `ray_` before it
_OF_WORKERS = ("data_s", "step_time_s")


class RayMetrics:
    """A MetricsSink that sets gauges of Ray (ray.util.metrics), which each node's agent exports to Prometheus.

    Rank 0 sets `ray_areal_ray_<name>{run}` and `ray_areal_ray_step`, every rank besides its own
    `ray_areal_ray_worker_<name>{run, rank}`: memory_peak_bytes, data_s and step_time_s. A gauge keeps its value until
    the process ends; a restarted run goes on in the same series. Costs some microseconds a value, at logged steps; the
    series of a run grow with its ranks by three each.

    Args:
        run: name of the run.
        rank: of this process.
        peak_bytes: the most memory that it has taken.
    """

    def __init__(self, run: str, rank: int, peak_bytes: Callable[[], int]) -> None:
        self._run, self._rank, self._peak_bytes = run, rank, peak_bytes
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._rank == 0:
            for name, value in {"step": step, **values}.items():
                self._set(name, value, {"run": self._run})
        own = {name: values[name] for name in _OF_WORKERS if name in values}
        for name, value in {"memory_peak_bytes": self._peak_bytes(), **own}.items():
            self._set(f"worker_{name}", value, {"run": self._run, "rank": str(self._rank)})

    def _set(self, name: str, value: float, tags: dict[str, str]) -> None:
        if name not in self._gauges:
            exported = _PREFIX + re.sub(r"[^A-Za-z0-9_]", "_", name)  # data/code/epoch
            self._gauges[name] = Gauge(exported, f"{name} of a run", tuple(tags))
        self._gauges[name].set(float(value), tags)

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...
