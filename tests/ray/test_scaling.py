"""What the controller asks of a real cluster to decide how many workers there are."""

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from areal_ray.controller import scaling_policy

pytestmark = pytest.mark.ray


def test_jobs_that_ask_an_autoscaler_for_machines_are_found(ray_cluster):
    actor = get_or_create_autoscaling_coordinator()
    jobs = scaling_policy.OtherJobs()
    try:
        jobs._thread.join(30)
        assert jobs.ask
    finally:
        ray.kill(actor)
