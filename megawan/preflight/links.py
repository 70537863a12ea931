"""The collectives of every group of the layout, tried with known numbers, timed, given up when they hang."""

import dataclasses
import datetime
import json
import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megawan import dist, health
from megawan.parallel.collectives import exchange_rows
from megawan.parallel.topology import Topology
from megawan.preflight.table import Check, one_line

ROUNDS = 3
ELEMENTS = {"cuda": 2**24, "cpu": 2**18}
"""float32 numbers that a rank holds of the whole message."""
MEND = (
    "look at the cables, the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), the firewall, and with"
    " NCCL_DEBUG=INFO at what NCCL says; --collective_timeout waits longer"
)
Group = torch_dist.ProcessGroup


@dataclass(frozen=True)
class Collective:
    """One collective on a rank's float32 values, with what must come of it."""

    name: str
    run: Callable[[Group, Tensor], Tensor]
    expected: Callable[[Tensor, int, int], Tensor]
    """From the values of a rank 0, this rank and the size of the group."""
    sent: Callable[[int], float]
    """How often a rank sends its values, from the size of the group."""


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of one group."""

    problem: str
    seconds: dict[str, float]
    """Of each collective, the median of a few rounds."""
    sent: dict[str, float]
    """Bytes that a rank sends in it."""
    note: str = ""
    hangs: bool = False


@dataclass
class Place:
    """How far a thread has come, in words."""

    at: str = "for groups"


def try_links(topology: Topology, device: torch.device, timeout_s: float, host: Group) -> list[Check]:
    """Return the rows of the world, of the Ulysses and of the ring groups, and of the ranks' health;
    collective, `host` is one of dist.host_group.

    A collective that is not over after `timeout_s` seconds is left behind in its thread, and no other is
    tried after it.
    """
    # What torch 2.13 says of names that DeepSpeed and older torch share.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    world = [list(range(topology.world_size))]
    trials: list[tuple[str, list[list[int]], Callable[[list[list[int]], Place], Outcome]]] = [
        ("world", world, lambda groups, place: _try_group(groups, OF_WORLD, device, place)),
        (
            "ulysses",
            topology.ulysses_groups(),
            lambda groups, place: _try_group(groups, OF_ULYSSES, device, place),
        ),
        ("ring", topology.ring_groups(), lambda groups, place: _try_group(groups, OF_RING, device, place)),
        ("health", world, lambda groups, place: _examine(groups, device, place)),
    ]
    rows, hanging = list[Check](), ""
    for name, groups, trial in trials:
        if hanging:
            rows.append(Check(name, None, f"not tried: {hanging} hangs"))
        elif len(groups[0]) == 1 and name != "health":
            rows.append(Check(name, None, "one rank exchanges nothing"))
        else:
            outcomes = _share(_in_time(partial(trial, groups), timeout_s), host)
            rows.append(_judge(name, groups, outcomes))
            hanging = name if any(outcome.hangs for outcome in outcomes) else ""
    return rows


def _in_time(work: Callable[["Place"], Outcome], timeout_s: float) -> Outcome:
    """Return what `work` returns, or where it waits once it takes too long; it then goes on in its thread."""
    done, place = list[Outcome](), Place()

    def run() -> None:
        try:
            done.append(work(place))
        except Exception as error:  # a thread's own would be lost
            done.append(Outcome(one_line(error), {}, {}))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if done:
        return done[0]
    return Outcome(f"still waits {place.at} after {timeout_s:g} s", {}, {}, hangs=True)


def _share(mine: Outcome, host: Group) -> list[Outcome]:
    """Return every rank's outcome, by rank."""
    texts = dist.gather_texts(json.dumps(dataclasses.asdict(mine)), host)
    return [Outcome(**json.loads(text)) for text in texts]


def _judge(name: str, groups: Sequence[Sequence[int]], outcomes: Sequence[Outcome]) -> Check:
    """Return the row of what all ranks saw."""
    bad = [rank for rank, outcome in enumerate(outcomes) if outcome.problem]
    if bad:
        by_problem: dict[str, list[int]] = {}
        for rank in bad:
            by_problem.setdefault(outcomes[rank].problem, []).append(rank)
        found = [
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}: {problem}"
            for problem, ranks in by_problem.items()
        ]
        return Check(name, False, "; ".join(found), MEND)
    if outcomes[0].note:
        return Check(name, True, outcomes[0].note)
    rates = []
    for what in outcomes[0].seconds:
        slowest = max(outcomes, key=lambda outcome: outcome.seconds[what])
        rates.append(f"{what} {slowest.sent[what] / slowest.seconds[what] / 1e9:.3g} GB/s")
    many = f"{len(groups)} groups of " if len(groups) > 1 else ""
    return Check(name, True, f"{many}{len(groups[0])} ranks; the slowest sends: {', '.join(rates)}")


def _try_group(
    groups: Sequence[Sequence[int]],
    collectives: Sequence[Collective],
    device: torch.device,
    place: Place,
) -> Outcome:
    """Return the times of this rank's group; all ranks make all groups."""
    group, seconds, sent = _own(groups, device), dict[str, float](), dict[str, float]()
    rank, size = group.rank(), group.size()
    fault = dist.strike(0, "collective", dist.faults())
    # Small whole numbers, so that every sum is exact.
    first = torch.arange(ELEMENTS[device.type] // size * size, device=device, dtype=torch.float32) % 7
    values = first + (math.nan if fault == "nan" else rank)
    for collective in collectives:
        place.at = f"in {collective.name}"
        found = collective.run(group, values)
        if not torch.equal(found, collective.expected(first, rank, size)):
            return Outcome(f"{collective.name} gives wrong numbers", {}, {})
        taken = []
        for _ in range(ROUNDS):
            _synchronize(device)
            began = time.perf_counter()
            collective.run(group, values)
            _synchronize(device)
            taken.append(time.perf_counter() - began)
        seconds[collective.name] = statistics.median(taken)
        sent[collective.name] = collective.sent(size) * values.nbytes
    return Outcome("", seconds, sent)


def _own(groups: Sequence[Sequence[int]], device: torch.device) -> torch_dist.ProcessGroup:
    """Return the new group that holds this rank, of the backend that training takes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins with GPU 0
    # Longer than anybody waits here: NCCL's own end would be that of the process.
    made = [
        torch_dist.new_group(
            list(ranks), backend=dist.backend_of(device), timeout=datetime.timedelta(hours=1)
        )
        for ranks in groups
    ]
    rank = torch_dist.get_rank()
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    assert isinstance(own, torch_dist.ProcessGroup)
    return own


def _all_reduce(group: Group, values: Tensor) -> Tensor:
    total = values.clone()
    torch_dist.all_reduce(total, group=group)
    return total


def _all_gather(group: Group, values: Tensor) -> Tensor:
    share = values[: len(values) // group.size()]
    whole = torch.empty_like(values)
    torch_dist.all_gather_into_tensor(whole, share, group=group)
    return whole


def _reduce_scatter(group: Group, values: Tensor) -> Tensor:
    share = torch.empty(len(values) // group.size(), device=values.device)
    torch_dist.reduce_scatter_tensor(share, values, group=group)
    return share


def _all_to_all(group: Group, values: Tensor) -> Tensor:
    return exchange_rows(values.view(group.size(), -1), group)


def _pass_on(group: Group, values: Tensor) -> Tensor:
    size, rank = group.size(), group.rank()
    received = torch.empty_like(values)
    ranks = torch_dist.get_process_group_ranks(group)
    works = torch_dist.batch_isend_irecv(
        [
            torch_dist.P2POp(torch_dist.isend, values, ranks[(rank + 1) % size], group),
            torch_dist.P2POp(torch_dist.irecv, received, ranks[(rank - 1) % size], group),
        ]
    )
    for work in works:
        work.wait()
    return received


def _ranks(first: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=first.device).unsqueeze(1)


def _scattered(first: Tensor, rank: int, size: int) -> Tensor:
    return first.view(size, -1)[rank] * size + size * (size - 1) / 2


OF_WORLD = (
    Collective(
        "all-reduce",
        _all_reduce,
        lambda first, rank, size: first * size + size * (size - 1) / 2,
        lambda size: 2 * (size - 1) / size,
    ),
    Collective(
        "all-gather",
        _all_gather,
        lambda first, rank, size: (first[: len(first) // size] + _ranks(first, size)).flatten(),
        lambda size: (size - 1) / size,
    ),
    Collective("reduce-scatter", _reduce_scatter, _scattered, lambda size: (size - 1) / size),
)
OF_ULYSSES = (
    Collective(
        "all-to-all",
        _all_to_all,
        lambda first, rank, size: first.view(size, -1)[rank] + _ranks(first, size),
        lambda size: (size - 1) / size,
    ),
)
OF_RING = (
    Collective(
        "to the next rank", _pass_on, lambda first, rank, size: first + (rank - 1) % size, lambda size: 1
    ),
)


def _examine(world: Sequence[Sequence[int]], device: torch.device, place: Place) -> Outcome:
    group, place.at = _own(world, device), "in messages or an all-reduce"
    found = health.examine(device, group=group)
    slow = "".join(f"; slow: {warning}" for warning in found.warnings())
    said = found.describe().removeprefix("health: ")
    return Outcome("; ".join(found.problems()), {}, {}, said + slow)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
