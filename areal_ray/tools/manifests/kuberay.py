"""KubeRay: a RayJob with its cluster, and the experiment in a ConfigMap.

https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/rayjob-quick-start.html
"""

from __future__ import annotations

import posixpath
import shlex
from typing import Any

import yaml

from areal_ray.tools.manifests.target import Target

_RAY = "2.60.0"
_FOLDER = "/etc/areal_ray"
_GRACE_S = 180  # from the word that a pod must go to its end: enough for a step, a save, and leaving
# The node says that it will be taken; the run saves and leaves it, which the watcher of preemptions sees to.
_DRAIN = (
    "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is ending' "
    f"--deadline-remaining-seconds {_GRACE_S - 30}; sleep {_GRACE_S - 60}"
)


def kuberay(target: Target) -> str:
    """Render a ConfigMap and a RayJob; `kubectl apply -f` takes both.

    The run keeps its name and its directory whatever pods come and go, so that each retry (`backoffLimit`, with a new
    cluster) goes on where the last one stood. Credentials of S3 come from the secret `<name>-s3`, if there is one, and
    appear nowhere here.
    """
    documents = [_config_map(target), _job(target)]
    return "---\n".join(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in documents)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stand as they are, to be read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _metadata(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "labels": {"app.kubernetes.io/name": "areal-ray", "app.kubernetes.io/instance": target.name},
    }


def _config_map(target: Target) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(target),
        "data": {"experiment.yaml": target.experiment},
    }


def _job(target: Target) -> dict[str, Any]:
    least, most = target.nodes
    train = ["areal-ray", "train", "--config", f"{_FOLDER}/experiment.yaml", *target.overrides]
    worker = {
        "groupName": "workers",
        "replicas": most,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": _pod(target, head=False),
    }
    cluster: dict[str, Any] = {
        "rayVersion": _RAY,
        "authOptions": {"mode": "token"},
        # No workers on the head: it is what must not be lost, and what needs no GPU.
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": _pod(target, head=True)},
        "workerGroupSpecs": [worker],
    }
    if least < most:
        cluster |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"idleTimeoutSeconds": 300}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(target),
        "spec": {
            "entrypoint": shlex.join(train),
            "backoffLimit": target.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }


def _pod(target: Target, head: bool) -> dict[str, Any]:
    mounts = [{"name": "experiment", "mountPath": _FOLDER, "readOnly": True}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "experiment", "configMap": {"name": target.name}},
        # Ray's object store and the copies in memory; what is not used is not taken.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{target.memory_gb // 2}Gi"}},
    ]
    if not target.on_s3:
        place = posixpath.abspath(target.config.run.storage_path.replace("~", "/home/ray", 1))
        mounts.append({"name": "runs", "mountPath": place})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": f"{target.name}-runs"}})
    memory = f"{8 if head else target.memory_gb}Gi"
    resources: dict[str, Any] = {"cpu": str(2 if head else target.cpus), "memory": memory}
    limits = {"memory": memory}
    if target.gpus and not head:
        resources["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(target.gpus)
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": target.image,
        "envFrom": [{"secretRef": {"name": f"{target.name}-s3", "optional": True}}],
        "resources": {"requests": resources, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
    if not head:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", _DRAIN]}}}
    return {
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "terminationGracePeriodSeconds": _GRACE_S,
        }
    }
