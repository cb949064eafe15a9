"""Anyscale, Docker, SLURM and systemd."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from areal_ray.tools.manifests.target import Target


def _train(target: Target) -> str:
    return shlex.join(["areal-ray", "train", "--config", target.path, *target.overrides])


def anyscale(target: Target) -> str:
    """Render the file of `anyscale job submit -f`. https://docs.anyscale.com/reference/job-api/"""
    least, most = target.nodes
    workers: dict[str, Any] = {"name": "workers", "min_nodes": least, "max_nodes": most}
    kind = "8CPU-32GB" if not target.gpus else f"{target.cpus}CPU-{target.memory_gb}GB-{target.gpus}xGPU"
    job = {
        "name": target.name,
        "image_uri": target.image,
        "entrypoint": _train(target),
        "working_dir": ".",
        "max_retries": target.retries,
        "compute_config": {
            # Instance types differ between clouds: put in yours.
            "head_node": {"instance_type": "8CPU-32GB", "resources": {"CPU": 0}},
            "worker_nodes": [{**workers, "instance_type": kind}],
        },
    }
    return yaml.safe_dump(job, sort_keys=False, width=120)


def docker(target: Target) -> str:
    """Render a Dockerfile for head and workers."""
    torch = (
        "RUN pip install --no-cache-dir torch==2.13.0"
        if target.gpus
        else "RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
    )
    command = ", ".join(f'"{part}"' for part in shlex.split(_train(target)))
    return f"""\
# One image for the head, the workers and the driver.
FROM python:3.11-slim
RUN useradd --create-home --uid 1000 ray
# A layer of its own, which changes seldom.
{torch}
RUN pip install --no-cache-dir "areal_ray[ray,s3]"
USER ray
WORKDIR /home/ray/job
COPY --chown=ray . .
CMD [{command}]
"""


def slurm(target: Target) -> str:
    """Render a batch script: a Ray cluster over the allocation, and the run on it.

    https://docs.ray.io/en/latest/cluster/vms/user-guides/community/slurm.html
    """
    nodes = target.nodes[1]
    gpus = f"#SBATCH --gpus-per-node={target.gpus}\n" if target.gpus else ""
    return f"""\
#!/bin/bash
#SBATCH --job-name={target.name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={target.cpus}
#SBATCH --mem={target.memory_gb}G
{gpus}#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the end of its time, or when it is preempted: save, leave, and stand in the queue again.
#SBATCH --signal=B:TERM@180
set -u

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

ended=0
leave() {{
    # The run itself is asked, and saves; what srun would pass on ends Ray first.
    areal-ray stop --directory {shlex.quote(_directory(target))}
    ended=1
}}
trap leave TERM

srun --nodes={nodes} --ntasks={nodes} \\
    ray symmetric-run --address "$head:$port" --min-nodes {nodes} -- \\
    env RAY_ADDRESS="$head:$port" {_train(target)} &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step"; status=$?; done
if [ "$ended" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _directory(target: Target) -> str:
    return f"{target.config.run.storage_path.rstrip('/')}/{target.config.run.name}"


def systemd(target: Target) -> str:
    """Render a unit for the driver, on a machine of the cluster (`ray start --head` there, or RAY_ADDRESS)."""
    return f"""\
[Unit]
Description=areal_ray: {target.config.run.name}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=3600
StartLimitBurst={target.retries}

[Service]
Type=exec
User=ray
WorkingDirectory=/home/ray/job
# RAY_ADDRESS, and credentials that must not stand here; readable by root alone.
EnvironmentFile=-/etc/areal_ray/{target.name}.env
ExecStart=/home/ray/job/.venv/bin/{_train(target)}
# 0: finished; 2: a mistake in the configuration, which another start does not mend; 130: stopped, and saved.
Restart=on-failure
RestartPreventExitStatus=2 130
SuccessExitStatus=130
RestartSec=10
# The run is told, and not its processes one by one; it saves before it leaves.
KillMode=mixed
TimeoutStopSec=600

[Install]
WantedBy=multi-user.target
"""
