"""Steps whose loss or gradient was no finite number, so that no rank updated: counted, said, and written down
so that tools/replay_step.py can take them again."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from megawan import dist
from megawan.cli import RunFailed
from megawan.files import write_json
from megawan.plan import Plan
from megawan.trainer import Taken

FOLDER = "skipped"
_SHOWN = 4


class SkippedSteps:
    """The skipped steps of a run; every method but `clear` is collective."""

    def __init__(self, folder: Path, plan: Plan, most: int) -> None:
        """`most`: how many in a row end the run."""
        self._folder = folder / FOLDER
        self._plan = plan
        self._most = most
        self._row = 0

    def clear(self) -> None:
        """Say that a step updated the weights."""
        self._row = 0

    def add(self, step: int, taken: Taken, grad_norm: float) -> None:
        """Count a step that did not. Raises RunFailed on every rank when it is one too many in a row."""
        self._row += 1
        drawn = gather_drawn(taken, self._plan.topology.coordinates(torch_dist.get_rank())[0], self._plan)
        file = self._folder / f"step_{step:07d}.json"
        if dist.is_main():
            for row in drawn:
                row["prompt"] = self._prompt(int(row["id"]))
            where = f"; {file}"
            try:
                self._folder.mkdir(exist_ok=True)
                write_json(file, {"step": step, "grad_norm": str(grad_norm), "samples": strict(drawn)})
            except OSError as error:  # a full disk is no reason to lose the run
                where = f"; not written down: {error}"
            worst = sorted(
                drawn, key=lambda row: -float(row["mse"]) if row["mse"] == row["mse"] else -torch.inf
            )
            said = ", ".join(
                f"sample {row['id']} (sigma {row['sigma']:.3f}, mse {row['mse']:.3g})"
                for row in worst[:_SHOWN]
            )
            print(
                f"step {step}: NOT updated, gradient norm {grad_norm:.3g}; worst: {said};"
                f" {self._row} in a row of at most {self._most}{where}",
                flush=True,
            )
        if self._row >= self._most:
            raise RunFailed(
                f"{self._row} steps in a row, up to step {step}, could not update the weights"
                f" (--optim.max_skipped); look at one with tools/replay_step.py {file}"
            )

    def _prompt(self, sample_id: int) -> str:
        try:
            return self._plan.data[sample_id].prompt
        except (OSError, ValueError) as error:  # perhaps the reason why the step failed
            return f"({error})"


def strict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with what JSON has no number for as text: nan, inf."""
    return [
        {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def gather_drawn(taken: Taken, dp_rank: int, plan: Plan) -> list[dict[str, Any]]:
    """Return id, epoch, sigma and mse of every video of a step, on every rank, in the order of the global
    batch.

    A video's mse is not a number when any rank's part of it is none.
    """
    rows = torch.cat(
        [
            torch.stack(
                [
                    torch.full(
                        drawn.sigma.shape, float(turn * plan.topology.dp_size + dp_rank), dtype=torch.float64
                    ),
                    torch.arange(len(drawn.sigma), dtype=torch.float64),
                    drawn.batch.sample_ids.double(),
                    drawn.batch.epochs.double(),
                    drawn.sigma.detach().double().cpu(),
                    drawn.mse.detach().double().cpu(),
                ],
                dim=1,
            )
            for turn, drawn in enumerate(taken.drawn)
        ]
    ).to(dist.collective_device())
    every = [torch.empty_like(rows) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(every, rows)
    parts: dict[tuple[int, int], list[list[float]]] = {}
    for row in torch.cat(every).cpu().tolist():
        parts.setdefault((int(row[0]), int(row[1])), []).append(row[2:])
    return [
        {
            "id": int(found[0][0]),
            "epoch": int(found[0][1]),
            "sigma": found[0][2],
            "mse": sum(part[3] for part in found) / len(found),
        }
        for _, found in sorted(parts.items())
    ]
