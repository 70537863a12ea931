"""Layouts in plain integers: who sits where, what fits, and what the message says when it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megawan.parallel.topology import Topology, divisors, legal_ulysses, nearest_layout, validate

degrees = st.integers(1, 8)


@given(dp=degrees, ring=degrees, ulysses=degrees)
def test_groups_tile_the_world_and_agree_with_the_coordinates(dp: int, ring: int, ulysses: int) -> None:
    topology = Topology(dp * ring * ulysses, ulysses, ring)
    ranks = range(topology.world_size)
    assert (topology.dp_size, topology.cp_size) == (dp, ring * ulysses)
    places = [topology.coordinates(rank) for rank in ranks]
    assert [(d * ring + r) * ulysses + u for d, r, u in places] == list(ranks)
    kinds = {
        "ulysses": (topology.ulysses_groups(), ulysses, (0, 1)),
        "ring": (topology.ring_groups(), ring, (0, 2)),
        "cp": (topology.cp_groups(), ring * ulysses, (0,)),
        "dp": (topology.dp_groups(), dp, (1, 2)),
    }
    for groups, size, fixed in kinds.values():
        assert sorted(rank for group in groups for rank in group) == list(ranks)
        for group in groups:
            assert len(group) == size and group == sorted(group)
            assert len({tuple(places[rank][axis] for axis in fixed) for rank in group}) == 1
    for group in (*topology.ulysses_groups(), *topology.cp_groups()):
        assert group == list(range(group[0], group[0] + len(group)))


def test_the_picture_in_the_documentation() -> None:
    topology = Topology(16, ulysses_degree=4, ring_degree=2)
    assert topology.dp_size == 2
    assert topology.coordinates(13) == (1, 1, 1)
    assert topology.ulysses_groups()[3] == [12, 13, 14, 15]
    assert topology.ring_groups()[5] == [9, 13]
    assert topology.cp_groups()[1] == [8, 9, 10, 11, 12, 13, 14, 15]
    assert topology.dp_groups()[5] == [5, 13]


@pytest.mark.parametrize(
    ("heads", "name", "wanted", "message"),
    [
        (
            12,
            "t2v-1.3B",
            (8, 8, 1),
            "ulysses_degree 8 does not divide the 12 heads of t2v-1.3B; legal ulysses_degree for 12 heads:"
            " 1, 2, 3, 4, 6, 12; on 8 ranks: 1, 2, 4; nearest legal layout: ulysses_degree 4 x ring_degree 2"
            " (data-parallel size 1)",
        ),
        (
            24,
            "ti2v-5B",
            (16, 16, 1),
            "ulysses_degree 16 does not divide the 24 heads of ti2v-5B; legal ulysses_degree for 24 heads:"
            " 1, 2, 3, 4, 6, 8, 12, 24; on 16 ranks: 1, 2, 4, 8; nearest legal layout: ulysses_degree 8"
            " x ring_degree 2 (data-parallel size 1)",
        ),
        (
            40,
            "t2v-14B",
            (16, 8, 4),
            "ulysses_degree 8 x ring_degree 4 = 32 does not divide the world of 16 ranks; legal"
            " ulysses_degree for 40 heads: 1, 2, 4, 5, 8, 10, 20, 40; on 16 ranks: 1, 2, 4, 8; nearest legal"
            " layout: ulysses_degree 8 x ring_degree 2 (data-parallel size 1)",
        ),
        (
            40,
            "t2v-14B",
            (8, 5, 1),
            "ulysses_degree 5 x ring_degree 1 = 5 does not divide the world of 8 ranks; legal ulysses_degree"
            " for 40 heads: 1, 2, 4, 5, 8, 10, 20, 40; on 8 ranks: 1, 2, 4, 8; nearest legal layout:"
            " ulysses_degree 4 x ring_degree 1 (data-parallel size 2)",
        ),
    ],
)
def test_the_message_lists_what_is_legal(
    heads: int, name: str, wanted: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        validate(*wanted, heads, name)
    assert str(caught.value) == message


@pytest.mark.parametrize("which", range(3))
def test_degrees_are_positive(which: int) -> None:
    wanted = [8, 2, 2]
    wanted[which] = 0
    label = ("world_size", "ulysses_degree", "ring_degree")[which]
    with pytest.raises(ValueError, match=f"{label} 0 must be 1 or more"):
        validate(wanted[0], wanted[1], wanted[2], 12, "any")
    with pytest.raises(ValueError, match=f"{label} 0 must be 1 or more"):
        Topology(*wanted)


def test_a_topology_refuses_what_does_not_fit_its_world() -> None:
    with pytest.raises(
        ValueError, match="ulysses_degree 3 x ring_degree 2 = 6 does not divide the world of 8 ranks"
    ):
        Topology(8, 3, 2)
    with pytest.raises(ValueError, match="rank 8 is outside the world of 8 ranks"):
        Topology(8).coordinates(8)


@given(
    world=st.integers(1, 96),
    ulysses=st.integers(1, 48),
    ring=st.integers(1, 16),
    heads=st.sampled_from([12, 24, 40, 1, 7]),
)
def test_validate_accepts_exactly_what_divides_and_its_advice_is_legal(
    world: int, ulysses: int, ring: int, heads: int
) -> None:
    fits = heads % ulysses == 0 and world % (ulysses * ring) == 0
    if fits:
        validate(world, ulysses, ring, heads, "m")
        assert nearest_layout(world, ulysses, ring, heads) == (ulysses, ring)
    else:
        with pytest.raises(ValueError, match="nearest legal layout"):
            validate(world, ulysses, ring, heads, "m")
    validate(world, *nearest_layout(world, ulysses, ring, heads), heads, "m")
    assert legal_ulysses(world, heads) == [d for d in divisors(heads) if world % d == 0]
