"""Context parallelism equals one process; its bytes on the wire; the faults that this must catch."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology
from tests.distributed import ROOT, run_distributed
from tests.parallel.workers import WIDTH, attention_errors

# Divisible; two primes; short enough for four ranks to leave the last empty (5: 2, 2, 1, 0); two; one.
LENGTHS = (16, 13, 7, 5, 2, 1)
WIRE_LENGTH, WIRE_HEADS = 24, 8
BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


def case(
    ulysses: int,
    ring: int,
    length: int,
    heads: int,
    kernel: str = "auto",
    dtype: str = "float64",
    kept: str = "",
) -> dict[str, Any]:
    return {
        "ulysses": ulysses,
        "ring": ring,
        "length": length,
        "heads": heads,
        "kernel": kernel,
        "dtype": dtype,
        "kept": kept,
    }


def layouts(world_size: int) -> list[tuple[int, int]]:
    degrees = (1, 2, 4)
    return [(u, r) for u, r in itertools.product(degrees, degrees) if world_size % (u * r) == 0]


def cases(world_size: int) -> list[dict[str, Any]]:
    """Every layout that fits with every length, both kernels and each dtype; odd heads for a pure ring."""
    every = [
        case(u, r, length, heads=3 if u == 1 else 2 * u) for u, r in layouts(world_size) for length in LENGTHS
    ]
    written_out = [case(u, r, 13, 4, kernel="math") for u, r in layouts(world_size)]
    rounded = [
        case(u, r, 13, 4, dtype=dtype) for u, r in layouts(world_size) for dtype in ("float32", "bfloat16")
    ]
    kept = [
        case(u, r, length, 2 * u, dtype=dtype, kept=kept)
        for u, r in layouts(world_size)
        for kept in ("result", "exchanged")
        for length, dtype in ((13, "float64"), (5, "float64"), (13, "float32"), (13, "bfloat16"))
    ]
    return every + written_out + rounded + kept


def wires(world_size: int) -> list[dict[str, Any]]:
    return [
        {"ulysses": u, "ring": r, "length": length, "heads": WIRE_HEADS, "dtype": dtype}
        for u, r in layouts(world_size)
        for length, dtype in (
            (WIRE_LENGTH, "float32"),
            (WIRE_LENGTH, "bfloat16"),
            (WIRE_LENGTH - 3, "float32"),
        )
    ]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    asked = {"cases": cases(2), "wires": wires(2)}
    return run_distributed("tests.parallel.workers:two_ranks", 2, arguments=asked, timeout=120)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    asked = {"cases": cases(4), "wires": wires(4)}
    return run_distributed("tests.parallel.workers:four_ranks", 4, arguments=asked, timeout=120)


@pytest.fixture(params=[2, 4])
def group(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    return request.param, request.getfixturevalue({2: "two", 4: "four"}[request.param])


def agrees(errors: dict[str, float], dtype: str) -> bool:
    """Whether the errors are those of rounding; below float64 the kernel rounds once for each block."""
    out, grad = {"float64": (1e-12, 1e-9), "float32": (1e-5, 1e-5), "bfloat16": (0.02, 0.03)}[dtype]
    return (
        errors["out"] < out
        and all(errors[name] < grad for name in ("dq", "dk", "dv"))
        and errors["padding"] == 0
    )


def test_every_layout_and_length_equals_one_process(group: tuple[int, list[dict[str, Any]]]) -> None:
    world_size, ranks = group
    for rank in ranks:
        found = zip(cases(world_size), rank["parity"], strict=True)
        assert not [(each, errors) for each, errors in found if not agrees(errors, each["dtype"])]


def test_one_process_is_the_identity() -> None:
    context = ContextParallel.single()
    assert (context.size, context.rank, context.ulysses_size, context.ring_size) == (1, 0, 1, 1)
    x = torch.zeros(1, 5, 3, WIDTH)
    assert context.shard(x) is x and context.gather(x, 5) is x
    assert context.local_length(5) == 5 and context.local_range(5) == (0, 5)
    assert context.attend(x, x, x, lambda q, k, v: v, 5) is x
    assert agrees(attention_errors(context, length=5, heads=3), "float64")


def test_one_rank_a_group_needs_no_process_group() -> None:
    assert ContextParallel.create(Topology(8, 1, 1), 3, 1.0).size == 1
    with pytest.raises(
        ValueError, match="a topology of 8 ranks needs a world of that size, not no process group"
    ):
        ContextParallel.create(Topology(8, 2, 1), 3, 1.0)


def test_places_are_consecutive_ulysses_innermost(four: list[dict[str, Any]]) -> None:
    assert [rank["places"] for rank in four] == [
        [[0, 2, 2, 1], [0, 2, 1, 2], [0, 4, 2, 2]],
        [[1, 2, 2, 1], [1, 2, 1, 2], [1, 4, 2, 2]],
        [[0, 2, 2, 1], [0, 2, 1, 2], [2, 4, 2, 2]],
        [[1, 2, 2, 1], [1, 2, 1, 2], [3, 4, 2, 2]],
    ]


def test_collectives_match_finite_differences(two: list[dict[str, Any]]) -> None:
    for rank in two:
        exchanges = {"ulysses", "ulysses, recomputed", "ring", "ring, recomputed"}
        assert set(rank["differences"]) == {"all_to_all", "all_gather", "gather", "shard"} | exchanges
        assert max(rank["differences"].values()) < 1e-8, rank["differences"]


@pytest.mark.parametrize("fault", ["strided output", "padding attended", "no rescale", "no row sums"])
def test_the_parity_check_catches(two: list[dict[str, Any]], fault: str) -> None:
    """A fault of the kind that trains for weeks unseen; without it the same case agrees."""
    for rank in two:
        assert agrees(rank["mutations"]["healthy ulysses"], "float64")
        assert agrees(rank["mutations"]["healthy ring"], "float64")
        assert agrees(rank["mutations"]["healthy kept"], "float64")
        errors = rank["mutations"][fault]
        assert not agrees(errors, "float64") and max(errors.values()) > 1e-2


def test_ulysses_equals_deepspeeds(group: tuple[int, list[dict[str, Any]]]) -> None:
    for rank in group[1]:
        assert rank["deepspeed"] < 1e-14


def test_bytes_on_the_wire(group: tuple[int, list[dict[str, Any]]]) -> None:
    """4 (L/U)·D/R·(U−1)/U for the all-to-alls of a block of L/R, plus 2 (L/P)·D·(R−1) for the ring.

    The gradients of keys and values travel as often, in float32. All in numbers; the padded length counts for
    Ulysses, and a ring sends no padding.
    """
    world_size, ranks = group
    for index, each in enumerate(wires(world_size)):
        u, r, size = each["ulysses"], each["ring"], BYTES[each["dtype"]]
        local = -(-each["length"] // (u * r))
        width = WIRE_HEADS * WIDTH
        ulysses = 4 * local * width * (u - 1) / u * size
        found = [rank["wire"][index] for rank in ranks]
        assert all(rank["forward_calls"] == 2 * (u > 1) + (r - 1) for rank in found)
        if each["length"] % (u * r) == 0:
            around = 2 * local * width
            for rank in found:
                assert rank["forward"] == ulysses + around * (r - 1) * size
                assert rank["backward"] == ulysses + around * (r - 1) * (size + 4)
        else:  # a ring of one group passes on every true token r - 1 times, split over the heads of ulysses
            groups = world_size // (u * r)
            total = sum(rank["forward"] for rank in found)
            ring = 2 * each["length"] * width * (r - 1) * size * groups
            assert total == ulysses * world_size + ring


def test_gradients_reach_the_weights_through_torch_compile(two: list[dict[str, Any]]) -> None:
    """A collective into a buffer that the compiler does not connect with its input would give zero."""
    for rank in two:
        assert max(rank["compiled"]) < 1e-12


def test_the_example_in_the_documentation_prints_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "context_parallel.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "example.py"
    file.write_text(code)
    for printed in run_distributed("tests.parallel.workers:run_file", 2, arguments={"file": str(file)}):
        assert printed.startswith("rank ") and printed in page


def test_what_cannot_work_says_so_on_every_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        kernel, heads, local, gathered, kept, rows, lengths, world = rank["refusals"]
        assert kernel.startswith("ring_size 2 needs an attention kernel with forward_lse and backward")
        assert heads == "5 heads do not divide by ulysses_size 2"
        assert local.startswith(
            "dimension 1 of (1, 3, 4, 8) must be 4: a rank's share of 7 tokens over 2 ranks"
        )
        assert gathered.startswith("dimension 1 of (1, 3, 4, 8) must be 5")
        assert kept.startswith("keeping an attention's result needs a kernel with forward_lse and backward")
        assert rows == "the first dimension of (3, 2) must be 2, a row for each rank"
        assert "has 3 queries and 3 keys, but the ring's lengths are [4, 2]" in lengths
        assert world == "a topology of 4 ranks needs a world of that size, not 2"
