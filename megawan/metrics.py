"""What a run says of itself: the progress line, TensorBoard events, and the meters behind both."""

import hashlib
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megawan import dist
from megawan.data.batch import Batch

SIGMA_BINS = 10
STRAGGLING = 0.2
"""Share of the time that steps may wait for their last rank before it is named."""


@dataclass(frozen=True)
class MetricsOptions:
    """Progress line and TensorBoard."""

    log_every: int = 1
    """Optimizer steps between two progress lines and points of every curve."""
    tensorboard: bool = True
    """Write TensorBoard events to OUTPUT/tensorboard."""


def check(options: MetricsOptions) -> None:
    """Raise ValueError for a cadence below 1."""
    if options.log_every < 1:
        raise ValueError(f"--metrics.log_every {options.log_every} must be 1 or more")


class LossMeter:
    """Sums of weighted loss and of per-sigma-bin unweighted loss since the last reading; stays on the
    device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2 + 2 * SIGMA_BINS, device=device)

    def add(self, loss: Tensor, per_sample: Tensor, sigma: Tensor) -> None:
        """Add one micro-batch: its scalar weighted loss, unweighted mse [B] and sigma [B], of this rank's
        tokens. What is no finite number is left out: it would hide all other steps of the interval."""
        loss, per_sample = loss.detach(), per_sample.detach().to(self._sums.dtype)
        self._sums[0] += loss.nan_to_num(0.0, 0.0, 0.0)
        self._sums[1] += loss.isfinite()
        bins = (sigma * SIGMA_BINS).long().clamp_(0, SIGMA_BINS - 1)
        self._sums[2 : 2 + SIGMA_BINS].index_add_(0, bins, per_sample.nan_to_num(0.0, 0.0, 0.0))
        self._sums[2 + SIGMA_BINS :].index_add_(0, bins, per_sample.isfinite().to(self._sums.dtype))

    def read(self) -> tuple[float, dict[int, float]]:
        """Return the mean loss and the mean of every sigma bin that was hit, over all ranks, and start anew.

        One all-reduce. Each rank holds cp_size times its tokens' share, so the mean over ranks is the mean
        over samples.
        """
        sums = dist.mean_over_ranks(self._sums).cpu()
        self._sums.zero_()
        counts = sums[2 + SIGMA_BINS :]
        by_bin = {i: float(sums[2 + i] / counts[i]) for i in range(SIGMA_BINS) if counts[i] > 0}
        return float(sums[0] / sums[1]), by_bin


class DataMeter:
    """What the steps since the last reading were made of; needs nothing of the device."""

    def __init__(self, dp_size: int) -> None:
        self._dp_size = dp_size
        self._start_anew()

    def _start_anew(self) -> None:
        self._tokens = self._replaced = self._steps = 0
        self._imbalance = 0.0

    def add(self, micro_batches: Sequence[Batch], tokens: int) -> None:
        """Count a step of this data-parallel rank and the tokens with loss that it had."""
        self._tokens += tokens
        self._replaced += sum(len(batch.replaced) for batch in micro_batches)
        self._imbalance += micro_batches[0].imbalance
        self._steps += 1

    def read(self) -> tuple[float, dict[str, float]]:
        """Return the tokens of all data-parallel ranks and the curves, and start anew; one all-reduce."""
        mine = torch.tensor([float(self._tokens), float(self._replaced)])
        # The ranks of a context-parallel group count the same, so the mean is that of the dp ranks.
        tokens, replaced = (dist.mean_over_ranks(mine) * self._dp_size).tolist()
        curves = {"data/imbalance": self._imbalance / self._steps, "data/replaced": round(replaced, 3)}
        self._start_anew()
        return tokens, curves


class Clock:
    """Seconds since the last reading, and how many of them went to waiting for data."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._waited = 0.0

    def add_wait(self, seconds: float) -> None:
        """Count seconds that the loop spent waiting for the loader."""
        self._waited += seconds

    def read(self) -> tuple[float, float]:
        """Return (seconds, of which waited for data) and start anew."""
        now = time.perf_counter()
        elapsed, waited = now - self._last, self._waited
        self._last, self._waited = now, 0.0
        return elapsed, waited


class Stragglers:
    """How long ranks waited for the last one at the start of steps since the last reading, and who it was."""

    def __init__(self) -> None:
        self._late: dict[int, float] = {}

    def add(self, rank: int, seconds: float) -> None:
        """Count a step whose start waited so long for this rank."""
        self._late[rank] = self._late.get(rank, 0.0) + seconds

    def read(self, elapsed: float) -> tuple[dict[str, float], str]:
        """Return the share of `elapsed` that was waited and, where it is much, a warning; start anew."""
        total, warning = sum(self._late.values()), ""
        if total > STRAGGLING * elapsed:
            rank, seconds = max(self._late.items(), key=lambda item: item[1])
            warning = (
                f"warning: steps waited {total / elapsed:.0%} of the time for the last rank to begin them,"
                f" mostly for rank {rank} ({seconds:.2f} s): its data, its machine or its network is slow"
            )
        self._late.clear()
        return {"perf/straggler_wait": total / elapsed}, warning


class RunLog:
    """The progress line and the TensorBoard writer of rank 0; does nothing on other ranks."""

    def __init__(self, folder: Path, options: MetricsOptions, first_step: int, steps: int) -> None:
        self._writer = None
        self._bar = None
        self._steps = steps
        if not dist.is_main():
            return
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 1 s of imports that --help does not need

            try:
                # purge_step drops what an interrupted run wrote past the checkpoint: no zig-zag after a
                # resume.
                self._writer = SummaryWriter(
                    str(folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10
                )
            except OSError as error:
                self._give_up(error)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def text(self, tag: str, body: str, step: int) -> None:
        """Show a text (the resolved configuration, say) in TensorBoard's text page."""
        if self._writer is not None:
            try:
                self._writer.add_text(tag, body, step)
            except OSError as error:
                self._give_up(error)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one point of these curves."""
        if self._writer is not None:
            try:
                for tag, value in scalars.items():
                    self._writer.add_scalar(tag, value, step)
            except OSError as error:
                self._give_up(error)

    def step(self, step: int, scalars: dict[str, float], seconds_per_step: float) -> None:
        """Write one point of every curve and the progress line."""
        if not dist.is_main():
            return
        self.scalars(step, scalars)
        line = (
            f"loss {scalars['train/loss']:.4f} | lr {scalars['train/lr']:.2e}"
            f" | grad_norm {scalars['train/grad_norm']:.3f}"
            f" | {seconds_per_step:.3f} s/step | {scalars['perf/tokens_per_s']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            left = (self._steps - step) * seconds_per_step
            print(f"step {step}/{self._steps} | {line} | {_duration(left)} left", flush=True)

    def close(self) -> None:
        """Flush and close; the events of a run that ends are complete."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Go on without curves: a full disk must not end a run that only its log needs."""
        self._writer = None
        print(f"warning: no TensorBoard events from here on: {error}", flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return peak GiB since the start: allocated GPU memory on a GPU, resident memory of this process on a
    CPU."""
    if device.type == "cuda":
        return {"mem/peak_gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"mem/peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def software() -> dict[str, Any]:
    """Return what must be the same on all nodes: versions, and a digest of this package's source."""
    package, digest = Path(__file__).resolve().parent, hashlib.blake2b(digest_size=8)
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return {
        "code": digest.hexdigest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": metadata.version("deepspeed"),
    }


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware for env.json; nothing of the shell's environment, which may hold
    secrets."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **software(),
        "host": platform.node(),
        "gpus": names,
    }
