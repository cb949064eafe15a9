"""Who keeps whose copies."""

import pytest

from areal_ray.checkpoint.memory.partners import places

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("nodes", "partners"),
    [
        ("a", [None]),
        ("aaa", [None, None, None]),
        ("ab", [1, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),
        ("aaab", [3, 3, 3, 0]),
        ("abbb", [1, 0, 0, 0]),
    ],
)
def test_the_partner_is_on_the_next_node(nodes: str, partners: list[int | None]) -> None:
    found = places(nodes)
    assert [place.partner for place in found] == partners
    for rank, place in enumerate(found):
        assert place.guests == tuple(each for each, partner in enumerate(partners) if partner == rank)
        assert place.neighbours == tuple(each for each, node in enumerate(nodes) if node == nodes[rank])


def test_a_thousand_ranks_have_one_guest_each() -> None:
    found = places([f"node {rank // 8}" for rank in range(1024)])
    assert {len(place.guests) for place in found} == {1}
