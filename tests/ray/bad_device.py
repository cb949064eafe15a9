"""An optimizer for a cluster whose second node has a bad device: checks a fake one where it is made."""

import ray
import torch

from areal_ray.cluster.bad_devices import DeviceName
from areal_ray.cluster.nodes import this_node
from areal_ray.worker.device_check import check
from areal_ray.worker.nvml import Unknown


class BadOnSecond:
    """Computes on the CPU, and wrongly on the node `second`."""

    def select(self): ...

    def upload(self, tensor):
        return tensor.clone()

    def product(self, left, right):
        return left @ right + (this_node()[0] == "second")

    def download(self, tensor):
        return tensor.clone()

    def release(self): ...

    def health(self):
        return Unknown()

    def name(self):
        return DeviceName(*this_node(), index=0, uuid="GPU-fake")


def adamw(groups, **options):
    if ray.is_initialized():
        check(BadOnSecond())
    return torch.optim.AdamW(groups, **options)
