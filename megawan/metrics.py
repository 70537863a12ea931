"""What a run says of itself: the progress line, TensorBoard events, and the meters behind both."""

import hashlib
import importlib.util
import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megawan import cli, cost, dist
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
    weight_delta: bool = True
    """Measure what a logged step changes in the weights; the fp32 masters are held twice while its optimizer
    works (not with an offloaded optimizer)."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one GPU, for MFU; default: that of the GPU found, if it is known."""
    wandb_project: str | None = None
    """Write the same curves to this project of Weights & Biases (pip install 'megawan[wandb]'; WANDB_MODE
    etc. apply)."""


def check(options: MetricsOptions) -> None:
    """Raise ValueError for a cadence below 1, a peak that is none, and wandb where it is not installed."""
    if options.log_every < 1:
        raise ValueError(f"--metrics.log_every {options.log_every} must be 1 or more")
    if options.peak_tflops is not None and not 0 < options.peak_tflops < math.inf:
        raise ValueError(f"--metrics.peak_tflops {options.peak_tflops} must be above 0 and finite")
    if options.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--metrics.wandb_project {options.wandb_project}: wandb is not installed; pip install"
            " 'megawan[wandb]', or leave it out: TensorBoard has the same curves"
        )


class LossReading(NamedTuple):
    """What the steps since the last reading lost, over all ranks. By tenth of sigma, those that were hit:
    unweighted and weighted. By dataset: its number, weighted."""

    loss: float
    by_sigma: dict[int, float]
    weighted_by_sigma: dict[int, float]
    by_dataset: dict[int, float]


class LossMeter:
    """Sums of the losses since the last reading; stays on the device."""

    def __init__(self, device: torch.device, datasets: int = 1) -> None:
        self._datasets = datasets
        # (weighted loss, micro-batches); by tenth (mse, weighted mse, samples); by dataset (weighted mse,
        # samples).
        self._sums = torch.zeros(2 + 3 * SIGMA_BINS + 2 * datasets, device=device)
        self._loss, by_sigma, by_dataset = self._sums.split((2, 3 * SIGMA_BINS, 2 * datasets))
        self._by_sigma, self._by_dataset = by_sigma.view(3, SIGMA_BINS), by_dataset.view(2, datasets)

    def add(
        self, loss: Tensor, per_sample: Tensor, sigma: Tensor, weight: Tensor, dataset: Tensor | None = None
    ) -> None:
        """Add one micro-batch: its scalar weighted loss; unweighted mse of this rank's tokens, sigma and
        weight of each sample, [B]; and which dataset each is of, int64 [B] (default: the first). What is no
        finite number is left out: it would hide all other steps of the interval."""
        loss, per_sample = loss.detach(), per_sample.detach().to(self._sums.dtype)
        self._loss += torch.stack((loss.nan_to_num(0.0, 0.0, 0.0), loss.isfinite()))
        mse, counted = per_sample.nan_to_num(0.0, 0.0, 0.0), per_sample.isfinite().to(self._sums.dtype)
        weighted = mse * weight.to(mse)
        tenth = (sigma * SIGMA_BINS).long().clamp_(0, SIGMA_BINS - 1)
        self._by_sigma.index_add_(1, tenth, torch.stack((mse, weighted, counted)))
        if self._datasets > 1 and dataset is not None:
            self._by_dataset.index_add_(1, dataset.to(mse.device), torch.stack((weighted, counted)))

    def read(self) -> LossReading:
        """Return the means over all ranks and start anew.

        One all-reduce. Each rank holds cp_size times its tokens' share, so the mean over ranks is the mean
        over samples.
        """
        sums = dist.mean_over_ranks(self._sums).cpu()
        self._sums.zero_()
        loss, by_sigma, by_dataset = sums.split((2, 3 * SIGMA_BINS, 2 * self._datasets))
        mse, weighted, samples = by_sigma.view(3, SIGMA_BINS)
        of_datasets, their_samples = by_dataset.view(2, self._datasets)
        return LossReading(
            float(loss[0] / loss[1]),
            _means(mse, samples),
            _means(weighted, samples),
            _means(of_datasets, their_samples),
        )


def _means(sums: Tensor, counts: Tensor) -> dict[int, float]:
    return {i: float(sums[i] / counts[i]) for i in range(len(counts)) if counts[i] > 0}


@dataclass(frozen=True)
class DataReading:
    """What the steps since the last reading were made of, over all data-parallel ranks."""

    tokens: float
    model_flops: float
    """3 x forward: what the training needs, whatever is recomputed."""
    hardware_flops: float
    """What the kernels run: recomputed products and attention's rebuilt scores included."""
    curves: dict[str, float]


class DataMeter:
    """Counts what the steps since the last reading were made of; needs nothing of the device."""

    def __init__(self, dp_size: int, flops: Mapping[tuple[int, ...], tuple[float, float]]) -> None:
        """`flops`: model and hardware FLOPs of training on one video of each latent shape."""
        self._dp_size = dp_size
        self._flops = flops
        self._start_anew()

    def _start_anew(self) -> None:
        self._tokens = self._replaced = self._steps = 0
        self._imbalance = 0.0
        self._model = self._hardware = 0.0

    def add(self, micro_batches: Sequence[Batch], tokens: int) -> None:
        """Count a step of this data-parallel rank and the tokens with loss that it had."""
        self._tokens += tokens
        self._replaced += sum(len(batch.replaced) for batch in micro_batches)
        self._imbalance += micro_batches[0].imbalance
        self._steps += 1
        for batch in micro_batches:
            model, hardware = self._flops[tuple(batch.latents.shape[1:])]
            self._model += len(batch.latents) * model
            self._hardware += len(batch.latents) * hardware

    def read(self) -> DataReading:
        """Return the sums over all data-parallel ranks and start anew; one all-reduce."""
        mine = torch.tensor([self._tokens, self._replaced, self._model, self._hardware], dtype=torch.float64)
        # The ranks of a context-parallel group count the same, so the mean is that of the dp ranks.
        world = torch.distributed.get_world_size()
        tokens, replaced, model, hardware = (dist.sum_over_ranks(mine) * self._dp_size / world).tolist()
        curves = {"data/imbalance": self._imbalance / self._steps, "data/bad_samples": round(replaced, 3)}
        self._start_anew()
        return DataReading(tokens, model, hardware, curves)


def speed(
    counted: DataReading,
    seconds: float,
    parts: Mapping[str, float],
    steps: int,
    world_size: int,
    peak: float | None,
) -> dict[str, float]:
    """Return the points of the curves about time; `peak`: FLOP/s of one GPU, None where nobody knows it.

    MFU is what the model needs (3 x forward) over the peak, HFU what the kernels ran.
    """
    curves = {
        "perf/step_time": seconds / steps,
        "perf/tokens_per_s": counted.tokens / seconds,
        "perf/tflops_per_gpu": counted.model_flops / (seconds * world_size) / 1e12,
        "perf/data_wait": parts.get("data", 0.0) / seconds,
        **{f"perf/time_{part}": spent / steps for part, spent in parts.items()},
    }
    if peak is not None:
        curves["perf/mfu"] = cost.mfu(counted.model_flops, seconds, world_size, peak)
        curves["perf/hfu"] = cost.mfu(counted.hardware_flops, seconds, world_size, peak)
    return curves


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
        return {"perf/straggler_ratio": total / elapsed}, warning


class RunLog:
    """The progress line, the TensorBoard writer and wandb of rank 0; does nothing on other ranks."""

    def __init__(
        self,
        folder: Path,
        options: MetricsOptions,
        first_step: int,
        steps: int,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`settings`: the resolved configuration, shown beside the curves."""
        self._writer = None
        self._bar = None
        self._wandb = None
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
                self._show(settings or {}, first_step)
            except OSError as error:
                self._give_up(error)
        if options.wandb_project is not None:
            self._wandb = open_wandb(options.wandb_project, folder, settings or {})
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def _show(self, settings: dict[str, Any], step: int) -> None:
        """Lay out TensorBoard's pages and put the settings on them."""
        from megawan.dashboard import layout, settings_summaries, settings_table

        assert self._writer is not None
        self._writer.add_custom_scalars(layout(settings))
        if settings:
            self._writer.add_text("settings", settings_table(settings), step)
            for summary in settings_summaries(settings):
                self._writer._get_file_writer().add_summary(summary)

    def text(self, tag: str, body: str, step: int) -> None:
        """Show a text (the plan of the run, say) in TensorBoard's text page."""
        if self._writer is not None:
            try:
                self._writer.add_text(tag, body, step)
            except OSError as error:
                self._give_up(error)

    def picture(self, step: int, tag: str, encoded: bytes, height: int, width: int) -> None:
        """Show an encoded picture (PNG, or GIF for a video) on the page of images."""
        if self._writer is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
            try:
                self._writer._get_file_writer().add_summary(
                    Summary(value=[Summary.Value(tag=tag, image=image)]), step
                )
            except OSError as error:
                self._give_up(error)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one point of these curves, in one event: forty of its own cost as much as small steps do."""
        if self._writer is not None and scalars:
            from tensorboard.compat.proto.summary_pb2 import Summary

            points = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            try:
                self._writer._get_file_writer().add_summary(Summary(value=points), step)
            except OSError as error:
                self._give_up(error)
        if self._wandb is not None and scalars:
            self._wandb.log(scalars, step=step)

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
        if self._wandb is not None:
            self._wandb.finish()

    def _give_up(self, error: OSError) -> None:
        """Go on without curves: a full disk must not end a run that only its log needs."""
        self._writer = None
        print(f"warning: no TensorBoard events from here on: {error}", flush=True)


def open_wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    """Return wandb's run of a run folder; the same one again when the folder's run is continued.

    Raises cli.RunFailed when wandb will not have it: no account, no network, a wrong name.
    """
    import wandb

    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    try:
        return wandb.init(
            project=project, dir=str(folder), name=folder.name, id=name, resume="allow", config=settings
        )
    except (wandb.Error, OSError, ValueError) as error:
        raise cli.RunFailed(
            f"--metrics.wandb_project {project}: {' '.join(str(error).split())} (WANDB_MODE=offline writes to"
            f" {folder} alone)"
        ) from None


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
