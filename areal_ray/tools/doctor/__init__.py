"""The doctor: what a run will meet, found before it starts."""

from areal_ray.tools.doctor.finding import Finding
from areal_ray.tools.doctor.levers import device_levers, host_levers
from areal_ray.tools.doctor.local import local_findings
from areal_ray.tools.doctor.memory import MemoryEstimate, estimate
from areal_ray.tools.doctor.nodes import node_findings

__all__ = ["Finding", "MemoryEstimate", "device_levers", "estimate", "host_levers", "local_findings", "node_findings"]
