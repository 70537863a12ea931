"""bf16_timestep_compat against the reference's loss, written out once more from the specification's text."""

import pytest
import torch
from torch.nn import functional

from megawan.flow.loss import FlowMatching, FlowOptions, flow_loss, latent_loss

SHAPE = (1, 3, 2, 2, 4)


class SpecScheduler:
    """§3.1 and §4 of the specification, line by line, for one scalar timestep."""

    def __init__(self, steps: int, shift: float) -> None:
        sigma = torch.linspace(1.0, 0.0, steps + 1)[:-1]
        self.sigmas = shift * sigma / (1 + (shift - 1) * sigma)
        self.timesteps = self.sigmas * 1000
        y = torch.exp(-2 * ((self.timesteps - 1000 / 2) / 1000) ** 2)
        lifted = y - y.min()
        self.weights = lifted * (1000 / lifted.sum())
        if steps != 1000:
            self.weights = self.weights * (steps / 1000)
            self.weights = self.weights + self.weights[1]

    def nearest(self, timestep: torch.Tensor) -> torch.Tensor:
        return torch.argmin((self.timesteps - timestep).abs())

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = self.sigmas[self.nearest(timestep)]
        return (1 - sigma) * x0 + sigma * noise


def spec_step(
    spec: SpecScheduler,
    timestep_id: int,
    x0: torch.Tensor,
    noise: torch.Tensor,
    pred: torch.Tensor,
    ti2v: bool,
) -> dict[str, torch.Tensor]:
    """§2's loss in bf16 with the errata's first-frame handling."""
    timestep = spec.timesteps[torch.tensor([timestep_id])].to(dtype=torch.bfloat16)
    x_t = spec.add_noise(x0, noise, timestep)
    target = noise - x0
    kept_pred, kept_target = pred, target
    if ti2v:
        x_t[:, :, 0:1] = x0[:, :, 0:1]
        kept_pred, kept_target = pred[:, :, 1:], target[:, :, 1:]
    weight = spec.weights[spec.nearest(timestep)]
    loss = functional.mse_loss(kept_pred.float(), kept_target.float()) * weight
    sigma = spec.sigmas[spec.nearest(timestep)]
    return {
        "timestep": timestep,
        "x_t": x_t,
        "target": target,
        "weight": weight,
        "loss": loss,
        "sigma": sigma,
    }


def bf16(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return draw[0], draw[1], draw[2]


@pytest.mark.parametrize("ti2v", [False, True])
@pytest.mark.parametrize(("steps", "shift"), [(1000, 5.0), (1000, 3.0), (1000, 1.0), (1000, 12.0), (50, 5.0)])
def test_every_number_of_the_reference_bit_for_bit(steps: int, shift: float, ti2v: bool) -> None:
    spec = SpecScheduler(steps, shift)
    flow = FlowMatching(FlowOptions(num_timesteps=steps, shift=shift, bf16_timestep_compat=True))
    for index in range(0, steps, 7):
        x0, noise, pred = bf16(index)
        expected = spec_step(spec, index, x0, noise, pred, ti2v)
        # float32 copies of the same numbers: the switch rounds what it is given.
        ours = flow.at_ids(x0.float(), noise.float(), [index], clean_frames=int(ti2v))
        assert ours.x_t.dtype == ours.target.dtype == torch.bfloat16
        assert torch.equal(ours.x_t, expected["x_t"])
        assert torch.equal(ours.target, expected["target"])
        assert torch.equal(ours.timestep, expected["timestep"].float())
        assert torch.equal(ours.sigma[0], expected["sigma"]) and torch.equal(
            ours.weight[0], expected["weight"]
        )
        made = latent_loss(pred, ours.target, ours.weight, clean_frames=int(ti2v))
        assert torch.equal(made.loss, expected["loss"])


def test_a_batch_is_its_samples() -> None:
    spec = SpecScheduler(1000, 5.0)
    flow = FlowMatching(FlowOptions(bf16_timestep_compat=True))
    ids = [0, 3, 417, 833, 999]
    draws = [bf16(i) for i in ids]
    x0, noise, pred = (torch.cat(column) for column in zip(*draws, strict=True))
    ours = flow.at_ids(x0, noise, ids)
    alone = [spec_step(spec, i, *draw, False) for i, draw in zip(ids, draws, strict=True)]
    for field in ("x_t", "target"):
        assert torch.equal(getattr(ours, field), torch.cat([one[field] for one in alone]))
    mean = torch.stack([one["loss"] for one in alone]).mean()
    assert float(latent_loss(pred, ours.target, ours.weight).loss) == pytest.approx(float(mean), rel=1e-6)


def test_the_token_loss_is_the_same_up_to_the_order_of_the_sum() -> None:
    flow = FlowMatching(FlowOptions(bf16_timestep_compat=True))
    x0, noise, pred = bf16(5)
    ours = flow.at_ids(x0, noise, [600])
    as_tokens = [x.reshape(1, 12, 4) for x in (pred, ours.target)]
    exact = latent_loss(pred, ours.target, ours.weight).loss
    same_order = flow_loss(*as_tokens, ours.weight, valid=None, valid_tokens=12, cp_size=1).loss
    assert torch.equal(same_order, exact)
    shuffled = [x.flip(1).transpose(1, 2).contiguous() for x in as_tokens]
    other_order = flow_loss(*shuffled, ours.weight, valid=None, valid_tokens=4, cp_size=1).loss
    assert float(other_order) == pytest.approx(float(exact), rel=1e-6)


def test_what_the_rounding_does_and_the_default_does_not() -> None:
    compat, exact = FlowMatching(FlowOptions(bf16_timestep_compat=True)), FlowMatching(FlowOptions())
    x0 = torch.zeros(1000, 1, 1, 1, 1)
    rounded = compat.at_ids(x0, x0, list(range(1000)))
    plain = exact.at_ids(x0, x0, list(range(1000)))
    assert len(plain.timestep.unique()) == 1000 and torch.equal(plain.sigma, exact.scheduler.sigmas)
    assert len(rounded.timestep.unique()) == 294
    assert float((rounded.timestep - plain.timestep).abs().max()) == pytest.approx(2.0, abs=0.01)
    assert int((rounded.weight == 0).sum()) == 10 and int((plain.weight == 0).sum()) == 1
    # Id 417 belongs to the low-noise expert of T2V-A14B; rounded, it is the high-noise expert's 414.
    assert float(plain.timestep[417]) < 875 < float(rounded.timestep[417])
    assert float(rounded.sigma[417]) == float(exact.scheduler.sigmas[414])


def test_the_draw_of_the_ids_is_the_same_with_and_without() -> None:
    options = {"seed": 2, "sample_ids": [1, 2, 3], "epochs": [0, 0, 0]}
    x0 = torch.zeros(3, 1, 2, 2, 2)
    rounded = FlowMatching(FlowOptions(bf16_timestep_compat=True)).sample(x0, **options)
    plain = FlowMatching(FlowOptions()).sample(x0, **options)
    assert torch.equal(plain.timestep.bfloat16().float(), rounded.timestep)
    assert torch.equal(plain.target.bfloat16(), rounded.target)
