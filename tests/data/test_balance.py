"""Micro-batches of unequal cost: every one dealt once, no rank waits longer than it must."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megawan.data.balance import deal, imbalance


def waits(costs: list[float], dealt: list[list[int]]) -> float:
    return sum(max(costs[number] for number in turn) for turn in dealt)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_every_micro_batch_is_dealt_once_and_neighbours_in_cost_share_a_turn(
    data: st.DataObject, accumulation: int, dp_size: int
) -> None:
    count = accumulation * dp_size
    costs = data.draw(st.lists(st.integers(1, 50).map(float), min_size=count, max_size=count))
    dealt = deal(costs, accumulation, dp_size)
    assert [len(turn) for turn in dealt] == [dp_size] * accumulation
    assert sorted(itertools.chain(*dealt)) == list(range(count))
    for earlier, later in itertools.pairwise(dealt):
        assert min(costs[number] for number in earlier) >= max(costs[number] for number in later)
    assert 1 <= imbalance(costs, dealt) <= dp_size
    # The dearest micro-batches cannot wait less than one turn each that holds them.
    assert waits(costs, dealt) == sum(sorted(costs, reverse=True)[::dp_size])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9).map(float), min_size=6, max_size=6))
def test_no_other_deal_waits_less(costs: list[float]) -> None:
    best = min(
        waits(costs, [list(order[turn * 2 : turn * 2 + 2]) for turn in range(3)])
        for order in itertools.permutations(range(6))
    )
    assert waits(costs, deal(costs, 3, 2)) == best


def test_equal_costs_stay_in_their_order() -> None:
    assert deal([7.0] * 6, 3, 2) == [[0, 1], [2, 3], [4, 5]]


def test_within_a_turn_the_rank_with_the_least_so_far_gets_the_dearest() -> None:
    costs = [9.0, 1.0, 8.0, 2.0]
    assert deal(costs, 2, 2) == [[0, 2], [1, 3]]  # 9 | 8, then 1 | 2
    assert imbalance(costs, [[0, 2], [1, 3]]) == (9 + 2) / (8.5 + 1.5)
    assert imbalance(costs, [[0, 1], [2, 3]]) == (9 + 8) / (5 + 5)
    assert imbalance([3.0, 3.0], [[1, 0]]) == 1


def test_another_number_of_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="3 micro-batches are not accumulation 2 x dp 2"):
        deal([1.0] * 3, 2, 2)
