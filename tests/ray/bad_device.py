"""An objective for a cluster whose second node has a bad device, a fake one."""

from areal_ray.cluster.bad_devices import DeviceName
from areal_ray.cluster.nodes import this_node
from areal_ray.engine.objectives import LanguageModeling
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


class CheckedLanguageModeling(LanguageModeling):
    """Checks it once in each process, with the first batch."""

    checked = False

    def loss(self, output, batch):
        if not self.checked:
            check(BadOnSecond())
            self.checked = True
        return super().loss(output, batch)
