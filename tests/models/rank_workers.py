"""What the ranks of test_ranks.py run: one model on its slice of the tokens."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megawan.models.variants import WanConfig
from megawan.models.wan import patchify
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology
from tests.models.peers import TINY, Inputs, random_inputs, random_model

replace = dataclasses.replace
BASE = replace(TINY, num_heads=4, num_layers=2, text_len=12)
KINDS = {
    "t2v": BASE,
    "ti2v": replace(BASE, model_type="ti2v", in_dim=48, out_dim=48),
    "vace": replace(BASE, model_type="vace", vace_layers=(0, 1), vace_in_dim=8),
}
# 45 tokens, 3: fewer than ranks, and 1,024: gates by weight; with what the backward pass recomputes.
LATENTS = {(3, 6, 10): "full", (1, 2, 6): "none", (4, 32, 32): "attention"}


def double_inputs(config: WanConfig, latent: tuple[int, int, int]) -> Inputs:
    clean = int(config.model_type == "ti2v")
    inputs = random_inputs(config, batch=2, latent=latent, seed=2, clean_frames=clean)
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return Inputs(
        **{name: value.double() if isinstance(value, Tensor) else value for name, value in values.items()}
    )


def run(
    kind: str, latent: tuple[int, int, int], recompute: str, context: ContextParallel
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the whole velocity tokens and, summed over the ranks, the gradient of every parameter."""
    config = KINDS[kind]
    model = random_model(config, seed=1, recompute=recompute).double()
    inputs = double_inputs(config, latent)
    out = model(
        inputs.latents,
        inputs.timestep,
        inputs.text,
        context=context,
        clean_frames=inputs.clean_frames,
        clip=inputs.clip,
        condition=inputs.condition,
        vace=inputs.vace,
    )
    weight = torch.randn(
        inputs.latents.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    target = patchify(weight, config.patch_size)
    length = target.shape[1]
    start, stop = context.local_range(length)
    (out * context.shard(target))[:, : stop - start].sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if context.size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    with torch.no_grad():
        return context.gather(out, length), gradients


def layouts(world_size: int) -> list[tuple[str, float, float]]:
    """Return for every case its name and the largest differences of outputs and gradients from one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sizes = ((4, 1), (2, 2), (1, 4))
    contexts = [
        ContextParallel.create(Topology(world_size, *degrees), dist.get_rank(), 60.0) for degrees in sizes
    ]
    found = []
    for kind in KINDS:
        for latent, recompute in LATENTS.items():
            whole, reference = run(kind, latent, "none", ContextParallel.single())
            scale = max(1.0, *(float(value.abs().max()) for value in reference.values()))
            for degrees, context in zip(sizes, contexts, strict=True):
                out, gradients = run(kind, latent, recompute, context)
                worst = max(float((gradients[name] - reference[name]).abs().max()) for name in reference)
                name = f"{kind} {latent} ulysses, ring {degrees} recompute {recompute}"
                found.append((name, float((out - whole).abs().max()), worst / scale))
    dist.destroy_process_group()
    return found
