import math

import pytest
import torch

from megawan.models.rope import KEPT_TABLES, RopeTables, axis_widths, rope_angles, rotate


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(128, (44, 42, 42)), (24, (8, 8, 8)), (12, (4, 4, 4)), (16, (8, 4, 4)), (4, (4, 0, 0))],
)
def test_a_head_is_split_over_the_axes(head_dim: int, widths: tuple[int, int, int]) -> None:
    assert axis_widths(head_dim) == widths
    assert sum(widths) == head_dim


def test_angles_are_position_times_frequency() -> None:
    t, h, w = 2, 3, 5
    angles = rope_angles((t, h, w), 128, 0, t * h * w)
    # Token (1, 2, 4); the first and last frequencies are those of the published tables.
    row = angles[(1 * h + 2) * w + 4]
    assert row[0] == 1 and row[22] == 2 and row[43] == 4
    torch.testing.assert_close(row[1:4].float(), torch.tensor([0.65793322, 0.43287613, 0.28480359]))
    torch.testing.assert_close(row[23:26].float(), 2 * torch.tensor([0.64494668, 0.41595622, 0.26826958]))
    assert row[21] == pytest.approx(1.519911e-4, rel=1e-6)
    assert row[63] == pytest.approx(4 * 1.550516e-4, rel=1e-6)


def test_a_rank_builds_only_its_rows_and_pads_with_the_identity() -> None:
    grid, length = (3, 3, 5), 45
    tables = RopeTables(24)
    whole = tables.rows(grid, 0, length, length, torch.device("cpu"), torch.float64)
    last = tables.rows(grid, 36, 45, 12, torch.device("cpu"), torch.float64)
    for part, full, rest in zip(last, whole, (1.0, 0.0), strict=True):
        assert part.shape == (12, 1, 12)
        assert torch.equal(part[:9], full[36:])
        assert (part[9:] == rest).all()
    empty = tables.rows(grid, 45, 45, 12, torch.device("cpu"), torch.float64)
    assert (empty[0] == 1).all() and (empty[1] == 0).all()


def test_tables_are_made_once_and_forgotten_in_order() -> None:
    tables = RopeTables(24)

    def cos(frames: int) -> torch.Tensor:
        return tables.rows((frames, 1, 1), 0, frames, frames, torch.device("cpu"), torch.float32)[0]

    first = cos(1)
    assert cos(1) is first
    for frames in range(2, KEPT_TABLES + 2):
        assert cos(1) is first and cos(frames).shape[0] == frames
    assert cos(2).shape == (2, 1, 12)
    assert len(tables._kept) == KEPT_TABLES


def test_rotation_turns_interleaved_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 24, generator=generator, dtype=torch.float64)
    angles = rope_angles((1, 1, 7), 24, 0, 7)
    turned = rotate(x, angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    torch.testing.assert_close(turned, torch.view_as_real(pairs).flatten(-2), rtol=0, atol=1e-14)
    # Lengths stay, and the scores of two tokens depend on their distance alone.
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    same = x[:, :1].expand(-1, 7, -1, -1)
    scores = rotate(same, angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))
    assert math.isclose(
        float(scores[0, 0, 0] @ scores[0, 3, 0]), float(scores[0, 2, 0] @ scores[0, 5, 0]), rel_tol=1e-12
    )


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(1, 5, 2, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    angles = rope_angles((5, 1, 1), 24, 0, 5)
    cos, sin = angles.cos().unsqueeze(1).float(), angles.sin().unsqueeze(1).float()
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
