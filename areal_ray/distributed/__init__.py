"""Ranks, meshes, and how a model is laid over them: FSDP, tensor parallelism. Imports config only."""

from areal_ray.distributed.ranks import RankError, Ranks

__all__ = ["RankError", "Ranks"]
