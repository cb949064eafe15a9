"""Single numbers between host and device, moved without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Reading:
    """Scalars on their way from the device to the host, all in one copy.

    Making one waits for nothing. `values` waits until these numbers are there, and not for what the device was given
    to do since: asked a step later, they have long arrived.

    Args:
        scalars: on one device; float32 and float64 are read as they are.
    """

    def __init__(self, scalars: Sequence[torch.Tensor]) -> None:
        self._host = torch.stack([scalar.detach().double() for scalar in scalars])
        self._copied: torch.cuda.Event | None = None
        if self._host.is_cuda:
            # Into memory that is not pinned the copy would be waited for here.
            pinned = torch.empty_like(self._host, device="cpu", pin_memory=True)
            self._host = pinned.copy_(self._host, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[float]:
        """The numbers, in the order in which they were given."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


def scalar_on(device: torch.device, value: torch.Tensor | float) -> torch.Tensor:
    """A number as a tensor on the device. One of the host's is filled in by a kernel: its copy would be waited for."""
    given = torch.as_tensor(value).detach()
    if given.device.type == "cpu" and device.type != "cpu":
        return torch.full((), given.item(), dtype=given.dtype, device=device)
    return given


def positive_or_one(weights: torch.Tensor) -> torch.Tensor:
    """The weights, and 1 where there is none, to divide by."""
    # `torch.where` would copy the 1 to the device, and wait for that.
    return weights.masked_fill(~(weights > 0), 1.0)
