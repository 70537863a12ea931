"""Who works with whom: world = dp x ring x ulysses, in plain integers.

Ranks of one context-parallel group are consecutive, Ulysses innermost (its all-to-all stays inside a node),
ring around it, data parallelism outermost. No process group is needed here, so a layout is judged before
any exists.
"""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Topology:
    """A world of `world_size` ranks split into context-parallel groups of ring_degree · ulysses_degree ranks.

    Raises ValueError when a degree is not positive or the group does not divide the world.
    """

    world_size: int
    ulysses_degree: int = 1
    ring_degree: int = 1

    def __post_init__(self) -> None:
        _check_degrees(self.world_size, self.ulysses_degree, self.ring_degree)
        if self.world_size % self.cp_size:
            raise ValueError(
                f"ulysses_degree {self.ulysses_degree} x ring_degree {self.ring_degree} = {self.cp_size}"
                f" does not divide the world of {self.world_size} ranks"
            )

    @property
    def cp_size(self) -> int:
        """How many ranks share one video."""
        return self.ulysses_degree * self.ring_degree

    @property
    def dp_size(self) -> int:
        """How many groups work on different videos."""
        return self.world_size // self.cp_size

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return (dp_rank, ring_rank, ulysses_rank) of a global rank; ValueError outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the world of {self.world_size} ranks")
        dp_rank, cp_rank = divmod(rank, self.cp_size)
        return dp_rank, *divmod(cp_rank, self.ulysses_degree)

    def ulysses_groups(self) -> list[list[int]]:
        """Return the groups that exchange heads for tokens: consecutive ranks."""
        return _blocks(self.world_size, self.ulysses_degree)

    def ring_groups(self) -> list[list[int]]:
        """Return the groups that pass keys and values on, each in ring order."""
        return [list(ranks) for block in self.cp_groups() for ranks in _columns(block, self.ulysses_degree)]

    def cp_groups(self) -> list[list[int]]:
        """Return the groups that share one video: consecutive ranks."""
        return _blocks(self.world_size, self.cp_size)

    def dp_groups(self) -> list[list[int]]:
        """Return the groups whose ranks hold the same part of different videos."""
        return _columns(list(range(self.world_size)), self.cp_size)


def validate(world_size: int, ulysses_degree: int, ring_degree: int, num_heads: int, name: str) -> None:
    """Return nothing if the layout fits the world and the `num_heads` heads of the model `name`.

    Raises ValueError with the legal degrees and the nearest legal layout.
    """
    _check_degrees(world_size, ulysses_degree, ring_degree)
    cp_size = ulysses_degree * ring_degree
    if num_heads % ulysses_degree:
        problem = f"ulysses_degree {ulysses_degree} does not divide the {num_heads} heads of {name}"
    elif world_size % cp_size:
        problem = (
            f"ulysses_degree {ulysses_degree} x ring_degree {ring_degree} = {cp_size}"
            f" does not divide the world of {world_size} ranks"
        )
    else:
        return
    for_heads = ", ".join(str(degree) for degree in divisors(num_heads))
    for_both = ", ".join(str(degree) for degree in legal_ulysses(world_size, num_heads))
    ulysses, ring = nearest_layout(world_size, ulysses_degree, ring_degree, num_heads)
    raise ValueError(
        f"{problem}; legal ulysses_degree for {num_heads} heads: {for_heads}; on {world_size} ranks:"
        f" {for_both}; nearest legal layout: ulysses_degree {ulysses} x ring_degree {ring}"
        f" (data-parallel size {world_size // (ulysses * ring)})"
    )


def legal_ulysses(world_size: int, num_heads: int) -> list[int]:
    """Return the Ulysses degrees that divide both the heads and the world, ascending."""
    return [degree for degree in divisors(world_size) if num_heads % degree == 0]


def nearest_layout(world_size: int, ulysses_degree: int, ring_degree: int, num_heads: int) -> tuple[int, int]:
    """Return the legal (ulysses, ring) nearest to the wanted one: by the group's size, then by ulysses.

    Nearness is a ratio, so 4 is as far from 2 as from 8; of two equally near ones the larger is taken,
    because a larger group is more likely to fit the memory that the wanted one was meant to fit.
    """
    wanted = ulysses_degree * ring_degree
    layouts = [
        (ulysses, ring)
        for ulysses in legal_ulysses(world_size, num_heads)
        for ring in divisors(world_size // ulysses)
    ]
    return min(
        layouts,
        key=lambda layout: (
            _ratio(layout[0] * layout[1], wanted),
            -layout[0] * layout[1],
            _ratio(layout[0], ulysses_degree),
            -layout[0],
        ),
    )


def divisors(number: int) -> list[int]:
    """Return the positive divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _check_degrees(world_size: int, ulysses_degree: int, ring_degree: int) -> None:
    for label, value in (
        ("world_size", world_size),
        ("ulysses_degree", ulysses_degree),
        ("ring_degree", ring_degree),
    ):
        if value < 1:
            raise ValueError(f"{label} {value} must be 1 or more")


def _ratio(a: int, b: int) -> Fraction:
    return Fraction(max(a, b), min(a, b))


def _blocks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, count, size)]


def _columns(ranks: list[int], width: int) -> list[list[int]]:
    return [ranks[column::width] for column in range(width)]
