"""What each rank does in the tests of sampling over ranks; started by tests/distributed.py."""

from typing import Any

import torch

from megawan import dist
from megawan.models.variants import get_variant
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology
from megawan.rng import generator_at
from megawan.sampling import Given, build, sample_latents
from megawan.solvers import SOLVERS
from tests.training import LivelyWeights

# 3 x 3 x 5 = 45 tokens: two ranks do not divide them.
SHAPE = (16, 3, 6, 10)


def sampled(context: ContextParallel | None, ranks: int) -> dict[str, Any]:
    """Return videos of every solver, and of an image-to-video model."""
    found = {}
    for name in ("debug", "debug-i2v"):
        wan = get_variant(name).config
        model = build(LivelyWeights(wan, 0), wan, torch.device("cpu"), torch.float64)
        generator = generator_at(0, "inputs", name)
        text = torch.randn(2, wan.text_len, wan.text_dim, generator=generator).double()
        given = Given()
        if wan.image_dim:
            assert wan.clip_tokens
            given = Given(
                clip=torch.randn(2, wan.clip_tokens, wan.image_dim, generator=generator).double(),
                condition=torch.randn(2, wan.in_dim - wan.out_dim, *SHAPE[1:], generator=generator).double(),
            )
        for solver in SOLVERS if name == "debug" else ("euler",):
            latents = sample_latents(
                model,
                text,
                torch.zeros(wan.text_len, wan.text_dim).double(),
                SHAPE,
                steps=4,
                shift=5.0,
                guidance=2.0,
                seed=1,
                solver=solver,  # type: ignore[arg-type]
                given=given,
                context=context,
            )
            found[f"{name} {solver}"] = latents.tolist()
    return found


def layouts() -> dict[str, Any]:
    """Return the videos of two layouts of this world."""
    place = dist.environment()
    dist.initialize(place, torch.device("cpu"), 60)
    seen = {}
    for ulysses, ring in ((place.world_size, 1), (1, place.world_size)):
        context = ContextParallel.create(Topology(place.world_size, ulysses, ring), place.rank, 60)
        seen[f"ulysses {ulysses} ring {ring}"] = sampled(context, place.world_size)
    dist.shutdown()
    return seen
