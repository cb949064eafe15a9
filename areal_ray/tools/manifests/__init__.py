"""Manifests: an experiment as what a cluster's own system takes, rendered from its configuration."""

from areal_ray.tools.manifests.kuberay import kuberay
from areal_ray.tools.manifests.machines import anyscale, docker, slurm, systemd
from areal_ray.tools.manifests.target import Target

RENDERERS = {"kuberay": kuberay, "anyscale": anyscale, "docker": docker, "slurm": slurm, "systemd": systemd}

__all__ = ["RENDERERS", "Target"]
