"""Who takes which micro-batch of a step, so that no rank waits long for another."""

from collections.abc import Sequence


def deal(costs: Sequence[float], accumulation: int, dp_size: int) -> list[list[int]]:
    """Return [turn][dp_rank] → which micro-batch, of accumulation x dp_size with these costs.

    All ranks go through a turn together, so a turn takes as long as its dearest micro-batch. Neighbours in
    the order of cost share a turn, which makes the sum of these the smallest possible, the dearest turn
    first; within a turn the dearest goes to the rank with the least so far. Equal costs stay in their order.
    """
    if len(costs) != accumulation * dp_size:
        raise ValueError(f"{len(costs)} micro-batches are not accumulation {accumulation} x dp {dp_size}")
    dearest_first = sorted(range(len(costs)), key=lambda number: -costs[number])
    loads = [0.0] * dp_size
    dealt = []
    for turn in range(accumulation):
        ranks = sorted(range(dp_size), key=loads.__getitem__)
        taken = dict(zip(ranks, dearest_first[turn * dp_size : (turn + 1) * dp_size], strict=True))
        dealt.append([taken[rank] for rank in range(dp_size)])
        loads = [load + costs[taken[rank]] for rank, load in enumerate(loads)]
    return dealt


def imbalance(costs: Sequence[float], dealt: Sequence[Sequence[int]]) -> float:
    """Return the cost of the dearest rank over that of the mean rank, turn by turn: 1 when no rank waits.

    The sum over turns of the highest cost, divided by the sum over turns of the mean cost.
    """
    turns = [[costs[number] for number in turn] for turn in dealt]
    return sum(max(turn) for turn in turns) / sum(sum(turn) / len(turn) for turn in turns)
