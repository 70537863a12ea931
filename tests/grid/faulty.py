"""Faults that trainers have shipped, put into one run at a time; the comparison must see each of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megawan import parity
from megawan.flow.loss import FlowLoss, FlowMatching, FlowSample, flow_loss
from megawan.models.rope import RopeTables
from megawan.models.wan import WanModel
from megawan.parallel import collectives
from megawan.parity import Layout, Problem, compare
from tests.grid.workers import bench
from tests.parallel.workers import PaddingAttended, strided_exchange

Patch = contextlib.AbstractContextManager[Any]


def mutations(problem: list[Any]) -> dict[str, dict[str, Any]]:
    """Return per fault, and for no fault, the differences in loss, gradients and the worst one's name."""
    here, (task, heads, grid) = bench(), problem
    small = Problem(task, heads, tuple(grid))
    layout = Layout(ulysses=here.world_size, micro_batch=parity.global_batch(here.world_size))
    wanted = here.reference(small, torch.float64)
    healthy_context = here.context(layout)
    faults: dict[str, Callable[[], Patch]] = {
        "none": contextlib.nullcontext,
        "loss without x cp_size": lambda: mock.patch.object(parity, "flow_loss", loss_without_factor),
        "strided all-to-all output": lambda: mock.patch.object(
            collectives, "exchange_rows", strided_exchange
        ),
        "rope rows not sharded": lambda: mock.patch.object(
            RopeTables, "rows", rows_from_zero(RopeTables.rows)
        ),
        "seeded by global rank": lambda: mock.patch.object(
            FlowMatching, "sample", seeded_by_rank(FlowMatching.sample)
        ),
        "padding attended": lambda: mock.patch.object(
            here, "context", lambda layout: PaddingAttended(healthy_context)
        ),
        "text gradient of rank 0 only": lambda: text_gradient_cut(lambda rank: rank > 0),
        "no text gradient": lambda: text_gradient_cut(lambda rank: True),
    }
    found = {}
    for name, fault in faults.items():
        with fault():
            outcome = here.plain(small, layout, torch.float64)
        difference = compare(outcome, wanted)
        found[name] = {
            "first_loss": abs(outcome.losses[0] / wanted.losses[0] - 1),
            "loss": difference.loss,
            "gradient": difference.gradient,
            "gradient_name": difference.gradient_name,
        }
    dist.barrier()
    dist.destroy_process_group()
    return found


def loss_without_factor(
    pred: Tensor, target: Tensor, weight: Tensor, *, valid: Tensor | None, valid_tokens: int, cp_size: int
) -> FlowLoss:
    """The fault: each rank's part of the loss is averaged over the ranks, not summed."""
    right = flow_loss(pred, target, weight, valid=valid, valid_tokens=valid_tokens, cp_size=cp_size)
    return FlowLoss(right.loss / cp_size, right.per_sample)


def rows_from_zero(healthy: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The fault: every rank turns its tokens as if they were the video's first."""

    def rows(
        self: RopeTables, grid: tuple[int, int, int], start: int, stop: int, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return healthy(self, grid, 0, stop - start, *rest)

    return rows


def seeded_by_rank(healthy: Callable[..., FlowSample]) -> Callable[..., FlowSample]:
    """The fault: the ranks that share a video draw different noise for it."""

    def sample(
        self: FlowMatching, x0: Tensor, *, seed: int, sample_ids: Tensor, epochs: Tensor, clean_frames: int
    ) -> FlowSample:
        own = seed + dist.get_rank()
        return healthy(self, x0, seed=own, sample_ids=sample_ids, epochs=epochs, clean_frames=clean_frames)

    return sample


@contextlib.contextmanager
def text_gradient_cut(where: Callable[[int], bool]) -> Iterator[None]:
    """The fault: the text branch gets no gradient on the ranks of `where`."""
    healthy = parity.build_model

    def detached(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.detach() if where(dist.get_rank()) else output

    def build(*arguments: Any) -> WanModel:
        model = healthy(*arguments)
        model.text_embedding.register_forward_hook(detached)
        return model

    with mock.patch.object(parity, "build_model", build):
        yield
