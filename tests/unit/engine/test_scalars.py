"""Single numbers between host and device: what is done to them, with the operations and CUDA calls recorded."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from areal_ray.engine.scalars import Reading, positive_or_one, scalar_on

pytestmark = pytest.mark.unit


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [2, 0.1, True, torch.tensor(3.0)])
def test_a_number_of_the_host_is_filled_in_and_not_copied(value):
    with Operations() as operations:
        made = scalar_on(torch.device("meta"), value)
    assert made.device.type == "meta"
    assert made.dtype == torch.as_tensor(value).dtype
    assert "full" in operations.names
    assert not {"_to_copy", "copy_"} & set(operations.names)


def test_on_its_own_device_a_number_is_what_it_was():
    given = torch.tensor(0.1, requires_grad=True)
    assert scalar_on(torch.device("cpu"), given).data_ptr() == given.data_ptr()
    assert torch.equal(scalar_on(torch.device("cpu"), 0.1), torch.tensor(0.1))


def test_a_weight_of_zero_divides_by_one_without_a_copy():
    weights = torch.tensor([2.5, 0.0, -1.0, math.nan])
    with Operations() as operations:
        made = positive_or_one(weights)
    assert made.tolist() == [2.5, 1.0, 1.0, 1.0]
    assert operations.names == ["gt", "bitwise_not", "masked_fill"]  # `where` would bring the 1 along as a tensor


def test_all_scalars_are_read_by_one_copy_as_they_are():
    values = [torch.tensor(0.1), torch.tensor(math.inf), torch.tensor(1 / 3, dtype=torch.float64)]
    assert Reading(values).values() == [float(torch.tensor(0.1)), math.inf, 1 / 3]


def test_a_copy_from_a_gpu_is_pinned_and_only_its_own_event_is_waited_for(monkeypatch):
    calls, pageable = [], torch.empty_like

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

    def empty_like(tensor, device, pin_memory):
        calls.append(("pinned", device, pin_memory))
        return pageable(tensor)

    def copy(target, source, non_blocking=False):
        calls.append(("copy", non_blocking))
        return target.set_(source)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    reading = Reading([torch.tensor(1.0)])
    assert calls == [("pinned", "cpu", True), ("copy", True), "record"]
    assert reading.values() == [1.0]
    assert calls[3:] == ["wait"]
