"""What each rank does in the loading tests; started by tests/distributed.py."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megawan import dist, ds_config, optim
from megawan.models.initial import InitialWeights
from megawan.models.layouts import open_weights
from megawan.models.variants import WanConfig
from megawan.models.wan import LEAF_MODULES, WanModel

CONFIGS = {
    # 62 million parameters: small beside a Wan, large beside what the libraries hold.
    "middle": WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=6, text_dim=256, text_len=64),
    # Its head's 15 biases are no even number: the last rank's part of them is padded.
    "small": WanConfig(
        dim=48,
        ffn_dim=96,
        freq_dim=64,
        in_dim=15,
        out_dim=15,
        num_heads=2,
        num_layers=2,
        text_dim=32,
        text_len=16,
        patch_size=(1, 1, 1),
    ),
}
SEED = 0


class PeakMemory:
    """How far this process's memory grows beyond `before` while it is entered, in bytes.

    resident: to its peak, by the kernel's own count, pages of mapped files included; so it is never below
    what the process itself allocated, and no peak is too short to be seen.
    """

    def __init__(self, before: int) -> None:
        self._before = before

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        return self

    def __exit__(self, *error: object) -> None:
        self.resident = memory("VmHWM") - self._before


def memory(field: str) -> int:
    """Return the bytes that the kernel counts for this process under `field`."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}[field]


def load(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Build and fill a sharded model for every case; return what it took and what stands in it."""
    from megawan import engine as engines

    place, device = dist.environment(), torch.device("cpu")
    dist.initialize(place, device, 120)
    results = []
    for case in cases:
        wan, stage = CONFIGS[case["config"]], case["stage"]
        resolved = ds_config.resolve(
            {"zero_optimization": {"stage": stage}},
            where="test",
            micro_batch=1,
            accumulation=1,
            world_size=place.world_size,
            grad_clip=1.0,
            precision="bf16",
            on_gpu=False,
        )
        before, anonymous = memory("VmRSS"), memory("RssAnon")
        with PeakMemory(before) as building:
            torch.use_deterministic_algorithms(
                True
            )  # fills empty tensors: their memory is there, and counted
            model = engines.build_model(lambda wan=wan: WanModel(wan), resolved, device)
            torch.use_deterministic_algorithms(False)
            unsharded = sum(parameter.numel() for parameter in model.parameters())
            engine = engines.initialize(model, LEAF_MODULES, resolved, optim.OptimOptions(), 10)
        with PeakMemory(before) as loading:
            source: Any = open_weights(Path(case["weights"]), wan)
            engines.load_weights(engine, Whole(source) if case.get("whole") else source, lambda: None)
        found: dict[str, Any] = {
            "building": building.resident,
            "loading": loading.resident,
            "after": memory("RssAnon") - anonymous,
            "layout": source.layout,
            "unsharded": unsharded,
        }
        if stage == 3:
            found["share"] = held_bytes(engine)
        if case.get("compare"):
            found["wrong"], found["elements"] = compare(engine, engines, wan, stage, source.dtype)
        results.append(found)
        engine.destroy()
        del engine, model, source
    dist.shutdown()
    return results


def held_bytes(engine: Any) -> int:
    """Return the bytes that ZeRO-3 holds of the model on this rank: weights, their gradients and masters (the
    first step adds Adam's moments)."""
    weights = [parameter.ds_tensor for parameter in engine.module.parameters()]
    gradients = weights  # as many, in the same dtype
    masters = engine.optimizer.fp32_partitioned_groups_flat
    return sum(x.numel() * x.element_size() for x in (*weights, *gradients, *masters))


def compare(engine: Any, engines: Any, wan: WanConfig, stage: int, dtype: Any) -> tuple[list[str], int]:
    """Return what differs from the weights that were written, in the dtype that they were written in, on this
    rank, and how many elements of the masters were compared."""
    written = InitialWeights(wan, SEED)

    def stored(name: str) -> Tensor:
        return written.load(name).to(dtype(name)).flatten()

    wrong, elements = [], 0
    engines._create_states(engine)  # the first step makes them, and `fragments` yields them too
    for piece in engines.fragments(engine):
        if piece.kind == "master":
            elements += len(piece.values)
            expected = stored(piece.name)[piece.start : piece.start + len(piece.values)].float()
            if not torch.equal(piece.values, expected):
                wrong.append(f"master of {piece.name}")
    places = engines._places(engine)
    for name, parameter in engine.module.named_parameters():
        expected, held = stored(name).bfloat16(), parameter.data.flatten()
        if stage == 3:
            start, size = (places[name].start, places[name].size) if name in places else (0, 0)
            expected, held = expected[start : start + size], parameter.ds_tensor[:size]
        if not torch.equal(held, expected):
            wrong.append(f"weight of {name}")
    return wrong, elements


class Whole:
    """A source that reads everything first, as a state dict would: what the memory test must notice."""

    def __init__(self, source: Any) -> None:
        self.keys, self.shape, self.dtype = source.keys, source.shape, source.dtype
        self.state = {key: source.load(key) for key in source.keys()}

    def load_part(self, key: str, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of one flattened tensor."""
        return self.state[key].flatten()[start : start + length]
