"""A look at every machine before hours of work depend on it: does each rank compute right, and which rank
or link is slow."""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from megawan import dist

SLOW = 2.0
"""A rank or link that takes so many times the median is named."""
_ROUNDS = 3


@dataclass(frozen=True)
class Health:
    """What every rank measured; the same on all ranks."""

    hosts: list[str]
    matmul_s: list[float]
    """A square matrix product, by rank."""
    neighbour_s: list[float]
    """To send a message to the next rank and get one from the rank before, by rank."""
    all_reduce_s: float
    """The slowest rank's."""
    size: int
    """Rows of the matrices."""
    message: int
    """Bytes of a message."""
    wrong: list[int]
    """Ranks whose product or sum was not what it must be."""

    def problems(self) -> list[str]:
        """Return the ranks that compute wrong numbers, in words."""
        return [f"rank {rank} on {self.hosts[rank]} computes wrong numbers" for rank in self.wrong]

    def warnings(self) -> list[str]:
        """Return the ranks and links that are slow, in words."""
        found = []
        for what, seconds in (("matrix products of", self.matmul_s), ("messages at", self.neighbour_s)):
            median = statistics.median(seconds)
            found += [
                f"{what} rank {rank} on {self.hosts[rank]} take {taken / median:.1f} times the median"
                for rank, taken in enumerate(seconds)
                if taken > SLOW * median
            ]
        return found

    def describe(self) -> str:
        """Return the measurements in one line."""
        flops = 2 * self.size**3 / statistics.median(self.matmul_s)
        rate = self.message / statistics.median(self.neighbour_s)
        return (
            f"health: {len(self.hosts)} ranks on {len(set(self.hosts))} machines; matrix products"
            f" {flops / 1e12:.3g} TFLOP/s a rank, to the next rank {rate / 1e9:.3g} GB/s, all-reduce of"
            f" {self.message / 2**20:.3g} MiB {self.all_reduce_s * 1e3:.3g} ms"
        )


def examine(
    device: torch.device,
    together: Callable[[], None] = lambda: None,
    group: torch_dist.ProcessGroup | None = None,
) -> Health:
    """Measure this world, collective: a second on GPUs, less on CPUs. Waits end with the group's time-out.

    `together` is called before the first exchange with other ranks, after what each does alone. `group`: all
    ranks, for tensors of `device`, when the default group is of another kind.
    """
    on_gpu = device.type == "cuda"
    size, elements = (8192, 2**24) if on_gpu else (256, 2**18)
    rank, world = torch_dist.get_rank(), torch_dist.get_world_size()
    # Ones: every element of the product is exactly `size` in any precision that holds it.
    ones = torch.ones(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    product, matmul = _timed(lambda: ones @ ones, device)
    right = bool((product == size).all())

    value = torch.full((elements,), float(rank), device=device)
    received = torch.empty_like(value)

    def exchange() -> torch.Tensor:
        works = torch_dist.batch_isend_irecv(
            [
                torch_dist.P2POp(torch_dist.isend, value, (rank + 1) % world, group),
                torch_dist.P2POp(torch_dist.irecv, received, (rank - 1) % world, group),
            ]
        )
        for work in works:
            work.wait()
        return received

    together()
    neighbour = matmul
    if world > 1:
        got, neighbour = _timed(exchange, device)
        right = right and bool((got == (rank - 1) % world).all())

    def add() -> torch.Tensor:
        total = value.clone()
        torch_dist.all_reduce(total, group=group)
        return total

    total, all_reduce = _timed(add, device)
    right = right and bool((total == world * (world - 1) / 2).all())
    mine = torch.tensor([matmul, neighbour, all_reduce, float(right)], dtype=torch.float64)
    mine = mine.to(dist.collective_device())
    every = [torch.empty_like(mine) for _ in range(world)]
    torch_dist.all_gather(every, mine)
    rows = [row.cpu().tolist() for row in every]
    return Health(
        dist.gather_texts(socket.gethostname()),
        [row[0] for row in rows],
        [row[1] for row in rows],
        max(row[2] for row in rows),
        size,
        value.nbytes,
        [number for number, row in enumerate(rows) if not row[3]],
    )


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """Return the result and the median seconds of a few rounds after a first one."""
    result, taken = work(), []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return result, statistics.median(taken)
