"""What is rendered, and for machines of which kind."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from areal_ray.config import Config


@dataclass(frozen=True)
class Target:
    """A run and the machines that it is to have.

    Args:
        config: of the run.
        experiment: its YAML as one file, groups put together.
        path: of that file, as it was typed.
        overrides: key=value strings beside it.
        image: container image with areal_ray.
        workers_per_node: training workers on one machine.
        memory_gb: of one machine.
        retries: new starts after the head or the driver was lost.
    """

    config: Config
    experiment: str
    path: str
    overrides: tuple[str, ...] = ()
    image: str = "areal_ray:latest"
    workers_per_node: int = 1
    memory_gb: int = 64
    retries: int = 20

    @property
    def name(self) -> str:
        """The run's name, as Kubernetes and others take it: lower case, digits, dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.config.run.name.lower()).strip("-")[:50] or "run"

    @property
    def nodes(self) -> tuple[int, int]:
        """Least and most machines with workers."""
        sizes = self.config.usable_sizes
        return math.ceil(sizes[0] / self.workers_per_node), math.ceil(sizes[-1] / self.workers_per_node)

    @property
    def cpus(self) -> int:
        """CPU cores for the workers of one machine, with one for Ray's own processes and the standbys."""
        return math.ceil(self.workers_per_node * self.config.worker_resources.get("CPU", 1)) + 1

    @property
    def gpus(self) -> int:
        return math.ceil(self.workers_per_node * self.config.worker_resources.get("GPU", 0))

    @property
    def on_s3(self) -> bool:
        return self.config.run.storage_path.startswith("s3://")
