"""Helpers of the training tests: weights whose every gradient is alive, and the same run without DeepSpeed or
ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megawan import config, optim
from megawan.data.batch import pad_text
from megawan.data.loader import make_loader
from megawan.dist import Environment
from megawan.models.wan import WanModel, patchify
from megawan.parity import LivelyWeights
from megawan.plan import Plan, make_plan
from megawan.rng import generator_at


def lively(plan: Plan) -> LivelyWeights:
    """Return the weights that every run of this plan's variant and seed starts from."""
    return LivelyWeights(plan.variant.config, plan.config.seed)


def plan_of(world_size: int, *argv: str) -> Plan:
    """Return the plan that train.py would make of these flags in a world of this size."""
    parsed = config.parse(argv, prog="train.py", description="")
    return make_plan(parsed, Environment(0, 0, world_size, world_size))


@dataclass
class Reference:
    """What a run should come to: loss and gradient norm per step, masters and first moments after the
    last."""

    losses: list[float]
    grad_norms: list[float]
    masters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    held_out: dict[str, float]
    """What validation says of the weights after the last step; nothing where no samples are held out."""


def reference_run(plan: Plan) -> Reference:
    """Return the run of a one-rank plan by plain torch: no DeepSpeed, no sharding, the whole global batch at
    once.

    In float64, so that the rounding that a comparison sees is that of the run alone.
    """
    options, wan = plan.config, plan.variant.config
    model = WanModel(wan).double()
    weights = lively(plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.load(name))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    groups = optim.parameter_groups(model.named_parameters(), shapes, options.optim.weight_decay)
    optimizer = optim.build_optimizer(groups, options.optim)
    schedule = optim.build_schedule(optimizer, options.optim, plan.steps)
    batches = make_loader(
        plan.data,
        seed=options.seed,
        micro_batch=plan.global_batch,
        accumulation=1,
        dp_rank=0,
        dp_size=1,
        text_len=wan.text_len,
        prompt_dropout=options.data.prompt_dropout,
        start_step=0,
        workers=0,
    )
    losses, grad_norms = [], []
    for _ in range(plan.steps):
        (batch,) = next(batches)
        sample = plan.flow.sample(
            batch.latents,
            seed=options.seed,
            sample_ids=batch.sample_ids,
            epochs=batch.epochs,
            clean_frames=plan.clean_frames,
        )
        pred = model(
            sample.x_t.double(),
            sample.timestep.double(),
            batch.text.double(),
            clean_frames=sample.clean_frames,
            clip=None if batch.clip is None else batch.clip.double(),
            condition=None if batch.condition is None else batch.condition.double(),
        )
        # The specification's loss written out: mean over all elements of each video, its clean frames left
        # out.
        error = (pred - patchify(sample.target, wan.patch_size)).square()
        frames = batch.latents.shape[2]
        counted = error.unflatten(1, (frames, -1))[:, sample.clean_frames :]
        loss = (counted.mean(dim=(1, 2, 3)) * sample.weight).mean()
        optimizer.zero_grad()
        loss.backward()
        grad_norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), options.optim.grad_clip)))
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return Reference(
        losses,
        grad_norms,
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        {name: optimizer.state[parameter]["exp_avg"] for name, parameter in model.named_parameters()},
        {} if plan.held_out is None else reference_validation(model, plan),
    )


@torch.no_grad()
def reference_validation(model: WanModel, plan: Plan) -> dict[str, float]:
    """Return the validation of a float64 model sample by sample, written out.

    Of M samples at J levels, the i-th at level j is at sigma (j + ((i + j) mod M + 0.5) / M) / J.
    """
    store, asked, wan = plan.held_out, plan.config.validation, plan.variant.config
    assert store is not None
    chosen = torch.randperm(len(store), generator=generator_at(0, "validation"))[: asked.samples].tolist()
    samples, count = [store[index] for index in sorted(chosen)], asked.samples
    means = torch.stack([sample.latents.double() for sample in samples]).mean(dim=(0, 2, 3, 4))
    rows = []  # level, sigma, mse, mse of the constant answer
    for i, (index, sample) in enumerate(zip(sorted(chosen), samples, strict=True)):
        for j in range(asked.levels):
            sigma = (j + ((i + j) % count + 0.5) / count) / asked.levels
            x0 = sample.latents.double()
            generator = generator_at(0, "validation", index, j)
            noise = torch.randn(x0.shape, generator=generator).double()
            x_t = (1 - sigma) * x0 + sigma * noise
            x_t[:, : plan.clean_frames] = x0[:, : plan.clean_frames]
            pred = model(
                x_t[None],
                torch.tensor([1000 * sigma], dtype=torch.float64),
                pad_text(sample.text, wan.text_len)[None].double(),
                clean_frames=plan.clean_frames,
            )
            target = (noise - x0)[None]
            error = (pred - patchify(target, wan.patch_size)).square()
            mse = error.unflatten(1, (x0.shape[1], -1))[:, plan.clean_frames :].mean()
            constant = (target[0, :, plan.clean_frames :] + means[:, None, None, None]).square().mean()
            rows.append((j, sigma, float(mse), float(constant)))
    grid = plan.flow.scheduler
    loss = 0.0
    for j in range(asked.levels):
        inside = (grid.sigmas * asked.levels).long().clamp(max=asked.levels - 1) == j
        here = [
            mse * float(grid.training_weights[grid.nearest_id(torch.tensor([1000 * sigma]))])
            for level, sigma, mse, _ in rows
            if level == j
        ]
        loss += float(inside.double().mean()) * sum(here) / len(here)
    found = {
        "eval/loss": loss,
        "eval/mse": sum(row[2] for row in rows) / len(rows),
        "eval/normalized": sum(row[2] for row in rows) / sum(row[3] for row in rows),
    }
    for tenth in sorted({int(10 * row[1]) for row in rows}):
        of_tenth = [row for row in rows if int(10 * row[1]) == tenth]
        mse = sum(row[2] for row in of_tenth)
        found[f"eval/mse_by_sigma/q{tenth}"] = mse / len(of_tenth)
        found[f"eval/normalized_by_sigma/q{tenth}"] = mse / sum(row[3] for row in of_tenth)
    return found
