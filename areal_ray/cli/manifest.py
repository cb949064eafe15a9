"""areal-ray manifest: an experiment as what a cluster's own system takes."""

from __future__ import annotations

import argparse
from typing import Any


def add_manifest(parser: argparse.ArgumentParser) -> None:
    kinds = ("kuberay", "anyscale", "docker", "slurm", "systemd")
    parser.add_argument("kind", choices=kinds, help="for which system")
    parser.add_argument("--image", default="areal_ray:latest", help="container image (default areal_ray:latest)")
    parser.add_argument("--workers-per-node", type=int, default=1, metavar="N", help="on one machine (default 1)")
    parser.add_argument("--memory-gb", type=int, default=64, metavar="N", help="of one machine (default 64)")
    parser.add_argument("--retries", type=int, default=20, metavar="N", help="after lost heads (default 20)")


def manifest(config: Any, arguments: argparse.Namespace) -> int:
    """Print a manifest."""
    from areal_ray.cli.jobs import refuse_secrets
    from areal_ray.config import Config
    from areal_ray.config.layers import GROUPS, merged_text, read_layers
    from areal_ray.tools.manifests import RENDERERS, Target

    refuse_secrets(arguments.overrides)
    own = tuple(text for text in arguments.overrides if text.partition("=")[0] not in GROUPS)
    groups = [text for text in arguments.overrides if text.partition("=")[0] in GROUPS]
    target = Target(
        config=config,
        experiment=merged_text(read_layers(arguments.config, groups, Config)),
        path=arguments.config,
        # Where the experiment comes along as one file its groups are in it.
        overrides=own if arguments.kind == "kuberay" else tuple(arguments.overrides),
        image=arguments.image,
        workers_per_node=arguments.workers_per_node,
        memory_gb=arguments.memory_gb,
        retries=arguments.retries,
    )
    print(RENDERERS[arguments.kind](target), end="")
    return 0
