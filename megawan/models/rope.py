"""Rotary positions in three axes: real cosine and sine tables, built in float64 once per grid and rank."""

from collections import OrderedDict

import torch
from torch import Tensor

from megawan.models.precision import wide

THETA = 10000.0
KEPT_TABLES = 8


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Return the numbers of a head that turn with (t, h, w): d − 4⌊d/6⌋, 2⌊d/6⌋, 2⌊d/6⌋ (128: 44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_angles(grid: tuple[int, int, int], head_dim: int, start: int, stop: int) -> Tensor:
    """Return the angles of tokens start..stop−1 of the flattened (t, h, w) grid, float64 [stop − start,
    head_dim / 2].

    Axis of width D turns pair i of position p by p · 10000^(−2i/D); the axes are concatenated t | h | w.
    """
    index = torch.arange(start, stop, device="cpu")
    _, height, width = grid
    places = (index // (height * width), index // width % height, index % width)
    angles = []
    for place, size in zip(places, axis_widths(head_dim), strict=True):
        frequency = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / max(size, 1))
        angles.append(torch.outer(place.double(), frequency))
    return torch.cat(angles, dim=1)


class RopeTables:
    """Cosine and sine rows of this rank's tokens, kept for the last few grids that were asked for."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._kept: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()

    def rows(
        self,
        grid: tuple[int, int, int],
        start: int,
        stop: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [length, 1, head_dim / 2]: tokens start..stop−1, then identity rows for
        padding.

        dtype float32 or float64; computed in float64 and rounded once.
        """
        key = (grid, start, stop, length, device, dtype)
        if key not in self._kept:
            angles = torch.zeros(length, self.head_dim // 2, dtype=torch.float64, device="cpu")
            angles[: stop - start] = rope_angles(grid, self.head_dim, start, stop)
            cos, sin = (
                table.unsqueeze(1).to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin())
            )
            self._kept[key] = (cos, sin)
            if len(self._kept) > KEPT_TABLES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, l, N, K] with each pair (a, b) = (x_2i, x_2i+1) turned to (a·cos − b·sin, a·sin + b·cos).

    cos, sin: [l, 1, K / 2]; arithmetic in float32 or wider, result in x's dtype.
    """
    a, b = wide(x).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
