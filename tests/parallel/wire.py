"""The bytes that a rank sends through the collectives of megawan.parallel, counted at torch.distributed."""

from types import TracebackType
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


class Wire:
    """While it is entered, counts what this rank sends to others, and in how many calls."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self.calls = 0
        self._all_to_all, self._batch = dist.all_to_all_single, dist.batch_isend_irecv
        self._patches = [
            mock.patch.object(dist, "all_to_all_single", self._counted_all_to_all),
            mock.patch.object(dist, "batch_isend_irecv", self._counted_batch),
        ]

    def __enter__(self) -> "Wire":
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for patch in self._patches:
            patch.stop()

    def take(self) -> tuple[float, int]:
        """Return the bytes and calls since the last time."""
        found = self.bytes, self.calls
        self.bytes, self.calls = 0.0, 0
        return found

    def _counted_all_to_all(self, output: Tensor, x: Tensor, group: dist.ProcessGroup) -> Any:
        self.bytes += x.numel() * x.element_size() * (group.size() - 1) / group.size()
        self.calls += 1
        return self._all_to_all(output, x, group=group)

    def _counted_batch(self, operations: list[dist.P2POp]) -> Any:
        self.bytes += sum(
            x.tensor.numel() * x.tensor.element_size() for x in operations if x.op is dist.isend
        )
        self.calls += 1
        return self._batch(operations)
