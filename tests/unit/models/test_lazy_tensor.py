"""Lazy tensors: any part of what moving values about gives, read from those parts of the sources that it needs."""

import pytest
import torch

from areal_ray.models.lazy_tensor import LazyTensor, part_of, windows

pytestmark = pytest.mark.unit

MOVES = {
    "experts": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "one expert": lambda a, b: torch.chunk(torch.stack([a, b]), 2)[1].squeeze(0),
    "chunks": lambda a, b: torch.chunk(a, 3)[2].contiguous(),
    "columns": lambda a, b: torch.split(a, [2, 4], dim=1)[1],
    "transposed": lambda a, b: a.t().contiguous(),
    "rotary": lambda a, b: a.view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6),
    "interleaved": lambda a, b: a.reshape(4, 2, 6).transpose(0, 1).reshape(a.shape),
    "rows of another width": lambda a, b: a.view(3, 16),
    "flat": lambda a, b: a.flatten(),
    "steps": lambda a, b: a[1:7:2],
    "row": lambda a, b: a[-1],
    "unbound": lambda a, b: torch.unbind(a, 1)[2],
    "other type": lambda a, b: a[...].to(torch.bfloat16),
    "with one in memory": lambda a, b: torch.cat([a, torch.ones(2, 6)]),
}


def lazy(tensor, reads):
    def read(box):
        reads.append(box)
        return part_of(tensor, box).clone()

    return LazyTensor(tensor.shape, tensor.dtype, read)


def sources():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 6, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_every_part_is_that_of_the_whole(move):
    a, b = sources()
    reads = []
    want, got = move(a, b), move(lazy(a, reads), lazy(b, reads))
    assert not reads
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.equal(got.whole(), want)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        box = tuple(sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in want.shape)
        assert torch.equal(part_of(got, box), part_of(want, box))


def test_a_fused_expert_needs_its_own_slices_only():
    a, b = sources()
    reads = []
    fused = MOVES["experts"](lazy(a, reads), lazy(b, reads))
    part_of(fused, ((1, 2), (0, 8), (2, 4)))
    assert reads == [((0, 8), (2, 4))]


def test_other_operations_read_the_whole():
    a, b = sources()
    assert torch.equal(lazy(a, []) + lazy(b, []), a + b)


def test_what_does_not_fit_together_is_said_before_it_is_read():
    a, _ = sources()
    with pytest.raises(ValueError, match="cannot be put together"):
        torch.stack([lazy(a, []), lazy(a[:7], [])])


def test_a_box_is_cut_into_windows_of_rows_and_large_rows_into_parts():
    assert windows(((0, 5), (0, 4)), itemsize=4, limit=32) == [((0, 2), (0, 4)), ((2, 4), (0, 4)), ((4, 5), (0, 4))]
    assert windows(((3, 5), (0, 3)), itemsize=4, limit=8) == [
        ((3, 4), (0, 2)), ((3, 4), (2, 3)), ((4, 5), (0, 2)), ((4, 5), (2, 3)),
    ]  # fmt: skip
    assert windows(((0, 2),), itemsize=4, limit=1) == [((0, 1),), ((1, 2),)]
    assert windows((), itemsize=4, limit=1) == [()]
