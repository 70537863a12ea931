"""The flow-matching SFT loss: draw a noise level and noise per sample, and weigh the error of the velocity.

    sigma ~ options.sampling,  noise ~ N(0, I)
    x_t = (1 − sigma)·x0 + sigma·noise,  timestep = 1000·sigma,  target = noise − x0
    loss = mean over the batch of weight(timestep)·MSE(model(x_t, timestep), target)

Specification §2 with its errata: float32, one timestep per sample, TI2V's clean first frame kept and left
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from megawan.flow.conditioning import put_clean_frames
from megawan.flow.sampling import (
    EXPERTS,
    LEVELS,
    LevelOptions,
    SigmaWindow,
    check_interval,
    check_sampling,
    expert_window,
    index_window,
    make_sampler,
    sigma_window,
)
from megawan.flow.schedule import MAX_TIMESTEP, FlowMatchScheduler, check_shift, check_steps, interpolate
from megawan.flow.weighting import get_weighting, window_scale
from megawan.rng import generator_at


@dataclass(frozen=True)
class FlowOptions:
    """Noise levels of training: their grid, how they are drawn, and their weights in the loss."""

    shift: float = 5.0
    """Shift k of the sigma grid; above 1 trains more on high noise. Wan trains with 5."""
    num_timesteps: int = 1000
    """Timesteps in the training grid."""
    sampling: str = "uniform_index"
    """How a sigma is drawn: uniform_index (as DiffSynth), uniform, logit_normal or mode."""
    logit_mean: float = 0.0
    """Mean of the unshifted level's logit, for logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of the unshifted level's logit, for logit_normal."""
    mode_scale: float = 1.29
    """SD3's mode scale, -1 to 1.75, for mode: above 0 the middle is drawn more often, below 0 the ends."""
    weighting: str = "gaussian"
    """Weight of the loss over timesteps: gaussian (as DiffSynth) or uniform."""
    expert: str | None = None
    """Draw only this expert's sigmas: t2v-A14B-high, t2v-A14B-low, i2v-A14B-high or i2v-A14B-low."""
    min_sigma: float | None = None
    """Draw only sigmas from here up (included), at any shift."""
    max_sigma: float | None = None
    """Draw only sigmas below this, at any shift (1 is included)."""
    min_timestep_boundary: float | None = None
    """DiffSynth's form of the window: first id as a fraction of the grid (0 is t = 1000)."""
    max_timestep_boundary: float | None = None
    """DiffSynth's form of the window: end of the ids as a fraction of the grid."""
    renormalize_weights: bool = False
    """Scale the weights so that a draw inside the window has weight 1 on average."""
    bf16_timestep_compat: bool = False
    """Round timestep, x_t and target to bfloat16 as DiffSynth does; for comparisons, not for training."""

    def __post_init__(self) -> None:
        """Raises ValueError for illegal values, unknown names and options that contradict each other."""
        check_shift(self.shift)
        check_steps(self.num_timesteps)
        check_sampling(self.sampling)
        get_weighting(self.weighting)
        self._check_sampling_parameters()
        self._check_window()
        if self.bf16_timestep_compat and self.sampling != "uniform_index":
            raise ValueError(
                "bf16_timestep_compat reproduces DiffSynth, which draws by uniform_index; "
                f"sampling is {self.sampling}"
            )

    def _check_sampling_parameters(self) -> None:
        readers = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
        defaults = {field.name: field.default for field in fields(self)}
        for name, reader in readers.items():
            value = getattr(self, name)
            if value != defaults[name] and self.sampling != reader:
                raise ValueError(
                    f"{name} {value} has no effect with sampling {self.sampling}; it is for {reader}"
                )
        if self.sampling in LEVELS:
            LEVELS[self.sampling](self.levels())  # raises for illegal parameters

    def _check_window(self) -> None:
        forms = {
            "expert": (self.expert,),
            "min_sigma/max_sigma": (self.min_sigma, self.max_sigma),
            "min_timestep_boundary/max_timestep_boundary": (
                self.min_timestep_boundary,
                self.max_timestep_boundary,
            ),
        }
        given = [form for form, values in forms.items() if any(value is not None for value in values)]
        if len(given) > 1:
            raise ValueError(f"the window is given in more than one form: {' and '.join(given)}; keep one")
        if self.expert is not None and self.expert not in EXPERTS:
            raise ValueError(f"unknown expert {self.expert!r}; legal: {', '.join(EXPERTS)}")
        low, high = self._sigma_bounds()
        check_interval("min_sigma", low, "max_sigma", high)
        check_interval(
            "min_timestep_boundary",
            _default(self.min_timestep_boundary, 0.0),
            "max_timestep_boundary",
            _default(self.max_timestep_boundary, 1.0),
        )

    def _sigma_bounds(self) -> tuple[float, float]:
        return _default(self.min_sigma, 0.0), _default(self.max_sigma, 1.0)

    def levels(self) -> LevelOptions:
        """Return the parameters of the continuous samplings."""
        return LevelOptions(self.logit_mean, self.logit_std, self.mode_scale)

    def window(self, sigmas: Tensor) -> SigmaWindow:
        """Return the window of these options on the grid `sigmas` [N]; the whole grid if none is given."""
        if self.expert is not None:
            return expert_window(sigmas, self.expert)
        if self.min_timestep_boundary is not None or self.max_timestep_boundary is not None:
            return index_window(
                sigmas, _default(self.min_timestep_boundary, 0.0), _default(self.max_timestep_boundary, 1.0)
            )
        return sigma_window(sigmas, *self._sigma_bounds())


@dataclass(frozen=True)
class FlowSample:
    """What the model gets and what its output is compared with.

    x_t, target: float32 (float64 for float64 x0, bfloat16 with bf16_timestep_compat) [B, C, T, H, W];
    timestep (= 1000·sigma), sigma, weight: float32 [B]; all on x0's device.
    clean_frames: how many first latent frames of x_t are clean and to be left out of the loss (0, or 1 for
    TI2V).
    """

    x_t: Tensor
    timestep: Tensor
    sigma: Tensor
    target: Tensor
    weight: Tensor
    clean_frames: int


class FlowMatching:
    """Draws the noise level and noise of each training sample; holds tables only, no generator state."""

    def __init__(self, options: FlowOptions) -> None:
        """Raises ValueError for a window without draws, or too few timesteps for the weighting."""
        self.options = options
        self.scheduler = FlowMatchScheduler(options.shift, weighting=options.weighting)
        self.scheduler.set_timesteps(options.num_timesteps, training=True)
        sigmas = self.scheduler.sigmas
        self.window = options.window(sigmas)
        self.sampler = make_sampler(
            options.sampling, options.levels(), sigmas=sigmas, shift=options.shift, window=self.window
        )
        self._weights = self.scheduler.training_weights
        if options.renormalize_weights:
            self._weights = self._weights * window_scale(self._weights_drawn(), self.sampler.probability)

    def sample(
        self,
        x0: Tensor,
        *,
        seed: int,
        sample_ids: Tensor | Sequence[int],
        epochs: Tensor | Sequence[int],
        clean_frames: int = 0,
    ) -> FlowSample:
        """Return the noised batch; a sample's draws depend on (seed, id, epoch) and its shape alone.

        x0 [B, C, T, H, W]; sample_ids, epochs: B whole numbers, on the CPU. Noise is drawn for the whole
        latent in float32 on the CPU, so every rank of a context-parallel group draws the same.
        Raises ValueError for shapes that do not fit or clean_frames other than 0 and 1.
        """
        _check_x0(x0, clean_frames)
        places = list(
            zip(_integers("sample_ids", sample_ids, x0), _integers("epochs", epochs, x0), strict=True)
        )
        sigma = [self.sampler.draw(generator_at(int(seed), "sigma", *place)) for place in places]
        noise = [_normal(x0.shape[1:], generator_at(int(seed), "noise", *place)) for place in places]
        return self.at_sigma(
            x0, torch.stack(noise).to(x0.device), torch.stack(sigma), clean_frames=clean_frames
        )

    def at_ids(
        self, x0: Tensor, noise: Tensor, ids: Tensor | Sequence[int], *, clean_frames: int = 0
    ) -> FlowSample:
        """Return the noised batch for given noise [B, C, T, H, W] and B given ids of the grid, 0 .. N − 1.

        For tests, validation at fixed levels and comparisons; ids may lie outside the window.
        Raises ValueError for shapes that do not fit or an id outside the grid.
        """
        places = _integers("ids", ids, x0)
        steps = len(self.scheduler.sigmas)
        if not all(0 <= place < steps for place in places):
            raise ValueError(f"ids must be 0 .. {steps - 1}, got {places}")
        return self.at_sigma(x0, noise, self.scheduler.sigmas[places], clean_frames=clean_frames)

    def at_sigma(self, x0: Tensor, noise: Tensor, sigma: Tensor, *, clean_frames: int = 0) -> FlowSample:
        """Return the noised batch for given noise [B, C, T, H, W] and sigma, float32 [B] on the CPU.

        The weight is that of the grid point nearest to timestep = 1000·sigma (specification §4.4). With
        bf16_timestep_compat the timestep is rounded to bfloat16 first and sigma becomes that grid point's
        too.
        Raises ValueError for shapes that do not fit.
        """
        _check_x0(x0, clean_frames)
        if sigma.shape != x0.shape[:1]:
            raise ValueError(f"sigma must be one per sample, [{len(x0)}], got shape {list(sigma.shape)}")
        timestep = sigma * MAX_TIMESTEP
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        if self.options.bf16_timestep_compat:
            timestep, dtype = _round_to_bf16(timestep), torch.bfloat16
        ids = self.scheduler.nearest_id(timestep)
        if self.options.bf16_timestep_compat:
            sigma = self.scheduler.sigmas[ids]
        x0, noise = x0.to(dtype), noise.to(dtype)
        x_t = interpolate(x0, noise, sigma)
        if clean_frames:
            x_t = put_clean_frames(x_t, x0, clean_frames)
        return FlowSample(
            x_t=x_t,
            timestep=timestep.to(x0.device),
            sigma=sigma.to(x0.device),
            target=self.scheduler.training_target(x0, noise),
            weight=self._weights[ids].to(x0.device),
            clean_frames=clean_frames,
        )

    def describe(self) -> str:
        """Return the start-up line: how sigma is drawn, and the window's ids, sigmas, share and mean weight.

        The share is of this sampling's draws without a window; the mean weight is that of a draw inside it.
        """
        options, window, steps = self.options, self.window, len(self.scheduler.sigmas)
        ids = f"ids {window.start}..{window.stop - 1}" if window.start < window.stop else "no ids"
        if options.sampling == "uniform_index":
            low, high = (
                float(self.scheduler.sigmas[window.stop - 1]),
                float(self.scheduler.sigmas[window.start]),
            )
        else:
            low, high = window.low, window.high
        mean = float((self._weights_drawn() * self.sampler.probability).sum())
        named = f" of {options.expert}" if options.expert else ""
        return (
            f"flow: shift {options.shift:g}, {steps} timesteps, sampling {options.sampling}, "
            f"weighting {options.weighting}{' renormalized' if options.renormalize_weights else ''}, "
            f"{'bf16 (compat)' if options.bf16_timestep_compat else 'float32'} timesteps; window{named}: "
            f"{ids} ({window.stop - window.start} of {steps}), sigma {low:.6f}..{high:.6f} "
            f"(t {low * MAX_TIMESTEP:.3f}..{high * MAX_TIMESTEP:.3f}), {self.sampler.share:.2%} of all "
            f"draws, mean weight {mean:.4f}"
        )

    def _weights_drawn(self) -> Tensor:
        """Return the weight of a draw of each id, [N]; where bfloat16 rounding moves it, another id's."""
        if not self.options.bf16_timestep_compat:
            return self._weights
        return self._weights[self.scheduler.nearest_id(_round_to_bf16(self.scheduler.timesteps))]


@dataclass(frozen=True)
class FlowLoss:
    """What `flow_loss` returns, float32 (float64 for float64 inputs).

    loss: 0-dim, to be differentiated.
    per_sample: detached [B], this rank's unweighted part of each sample's MSE, times cp_size: its mean
    over the context-parallel group is the sample's MSE.
    """

    loss: Tensor
    per_sample: Tensor


def flow_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    valid: Tensor | None,
    valid_tokens: int,
    cp_size: int,
) -> FlowLoss:
    """Return the weighted MSE over this rank's tokens, float32 (float64 for float64 pred or target).

    loss = mean over B of weight_b · sum over valid (pred − target)² / (valid_tokens·P) · cp_size

    pred, target [B, l, P]: this rank's tokens; weight [B]; valid bool [l], False for padding and clean-frame
    tokens (None: all are valid); valid_tokens: how many the whole sample has, over all ranks of the
    context-parallel group.
    The mean over the group of `cp_size` ranks is then the sample's loss, which is what DeepSpeed's averaging
    gives.
    Raises ValueError for shapes that do not fit or an impossible valid_tokens.
    """
    _check_loss(pred, target, weight)
    if pred.ndim != 3:
        raise ValueError(f"pred must be tokens [B, l, P], got shape {list(pred.shape)}")
    batch, tokens, values = pred.shape
    if cp_size < 1:
        raise ValueError(f"cp_size must be at least 1, got {cp_size}")
    if valid is not None and (valid.shape != (tokens,) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [{tokens}], got {valid.dtype} {list(valid.shape)}")
    fewest = tokens if valid is None else 1
    if not fewest <= valid_tokens <= tokens * cp_size:
        raise ValueError(
            f"valid_tokens is the whole sample's count, here {fewest} .. {tokens * cp_size} ({tokens} tokens "
            f"on each of {cp_size} rank(s){', no mask' if valid is None else ''}), got {valid_tokens}"
        )
    error = pred.to(_loss_dtype(pred, target)) - target.to(_loss_dtype(pred, target))
    if valid is not None:
        # Before squaring: whatever padding holds, NaN included, must not reach the sum or a gradient.
        error = torch.where(valid[None, :, None], error, torch.zeros_like(error))
    per_sample = error.square().sum(dim=(1, 2)) / (valid_tokens * values) * cp_size
    return FlowLoss((weight.to(per_sample) * per_sample).mean(), per_sample.detach())


def latent_loss(pred: Tensor, target: Tensor, weight: Tensor, *, clean_frames: int = 0) -> FlowLoss:
    """Return the same loss for a whole velocity [B, C, T, H, W] on one rank, summed in the reference's order.

    For comparing with another trainer and for notebooks. The first `clean_frames` latent frames are left out.
    Raises ValueError for shapes that do not fit.
    """
    _check_loss(pred, target, weight)
    _check_x0(pred, clean_frames)
    pred, target = (x[:, :, clean_frames:].to(_loss_dtype(pred, target)) for x in (pred, target))
    per_sample = functional.mse_loss(pred, target, reduction="none").mean(dim=(1, 2, 3, 4))
    return FlowLoss((weight.to(per_sample) * per_sample).mean(), per_sample.detach())


def _check_x0(x0: Tensor, clean_frames: int) -> None:
    if x0.ndim != 5:
        raise ValueError(f"a batch of latents must be [B, C, T, H, W], got shape {list(x0.shape)}")
    if clean_frames not in (0, 1):
        raise ValueError(f"clean_frames must be 0, or 1 for TI2V, got {clean_frames}")
    if x0.shape[2] <= clean_frames:
        raise ValueError(
            "with a clean first frame a sample needs at least 2 latent frames (5 pixel frames), "
            f"got {x0.shape[2]}"
        )


def _check_loss(pred: Tensor, target: Tensor, weight: Tensor) -> None:
    if pred.shape != target.shape:
        raise ValueError(
            f"pred and target must have one shape, got {list(pred.shape)} and {list(target.shape)}"
        )
    if weight.shape != pred.shape[:1]:
        raise ValueError(f"weight must be one per sample, [{len(pred)}], got shape {list(weight.shape)}")


def _loss_dtype(pred: Tensor, target: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32


def _integers(name: str, values: Tensor | Sequence[int], x0: Tensor) -> list[int]:
    numbers = torch.as_tensor(values)
    if numbers.is_floating_point() or numbers.shape != x0.shape[:1]:
        raise ValueError(
            f"{name} must be {len(x0)} whole numbers, one per sample, "
            f"got {numbers.dtype} of shape {list(numbers.shape)}"
        )
    return [int(number) for number in numbers.tolist()]


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _round_to_bf16(timestep: Tensor) -> Tensor:
    return timestep.to(torch.bfloat16).to(torch.float32)


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
