"""What GPUs can do, by name: peak FLOP/s, memory, bandwidths and links, from their makers' data sheets.

Plain numbers, nothing of ours imported. Bandwidths are bytes a second, links of one GPU in one direction
(data sheets print both directions added up). A GPU that is not here is read from JSON.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

GB = 10**9

# Dense bf16 FLOP/s with fp32 accumulation, no sparsity (data sheets print twice that, "with sparsity"). The
# first row that occurs in a device's name as whole words counts, so the longer names come first.
GPU_PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        "GB300": 2500e12,
        "GB200": 2500e12,
        "B300": 2250e12,
        "B200": 2250e12,
        "GH200": 989e12,
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "H800": 989e12,
        "H20": 148e12,
        "A100": 312e12,
        "A800": 312e12,
        "A40": 150e12,
        "A30": 165e12,
        "A10": 125e12,
        "RTX 6000 Ada": 364e12,
        "RTX A6000": 155e12,
        "RTX 5090": 209e12,
        "RTX 4090": 165e12,
        "L40S": 362e12,
        "L40": 181e12,
        "L4": 121e12,
        "MI355X": 2500e12,
        "MI325X": 1307e12,
        "MI300X": 1307e12,
    }
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device from its name (`torch.cuda.get_device_name()`), None if not
    known."""
    return next(
        (peak for name, peak in GPU_PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None
    )


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in the machines that it is commonly sold in."""

    name: str
    peak_flops: float  # dense bf16
    memory_gib: float  # the data sheet's "GB": a card sold as 80 GB shows 79 to 80 GiB
    memory_bandwidth: float
    intra_link: float  # to the other GPUs of its NVLink (Infinity Fabric, PCIe) domain
    inter_link: float  # its share of the node's network cards
    host_link: float  # to the host's memory
    gpus_per_node: int = 8  # as Slurm counts them
    domain: int = 8  # GPUs that reach each other over intra_link
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of the peak, (slow, fast), where they were measured: gemm, attention_forward, attention_backward."""


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            # A100 data sheet (SXM): 312 TFLOP/s, 1,555 and 2,039 GB/s, NVLink 600 GB/s, PCIe 4.0 x16; DGX
            # A100 data sheet: 8 GPUs, 8 ports of 200 Gb/s.
            Gpu("a100-40", 312e12, 40, 1555 * GB, 300 * GB, 25 * GB, 31.5 * GB),
            Gpu("a100-80", 312e12, 80, 2039 * GB, 300 * GB, 25 * GB, 31.5 * GB),
            # H100 data sheet (SXM): 1,979 TFLOP/s with sparsity, 3.35 TB/s, NVLink 900 GB/s, PCIe 5.0 x16;
            # DGX H100 data sheet: 8 GPUs, 8 ports of 400 Gb/s.
            Gpu("h100", 989e12, 80, 3350 * GB, 450 * GB, 50 * GB, 63 * GB),
            # H200 data sheet (SXM): as H100 with 141 GB at 4.8 TB/s.
            Gpu("h200", 989e12, 141, 4800 * GB, 450 * GB, 50 * GB, 63 * GB),
            # DGX B200 data sheet: 8 GPUs with 1,440 GB at 64 TB/s, NVLink 14.4 TB/s, ports of 400 Gb/s. HGX
            # data sheet: 36 PFLOP/s bf16 with sparsity for 8.
            Gpu("b200", 2250e12, 180, 8000 * GB, 900 * GB, 50 * GB, 63 * GB),
            # GB200 NVL72 data sheet: 72 GPUs with 360 PFLOP/s bf16 with sparsity, 13.4 TB at 576 TB/s, NVLink
            # 130 TB/s; a compute tray, a node to Slurm, has 4 GPUs, 2 Grace CPUs (NVLink-C2C 900 GB/s each,
            # shared by 2 GPUs) and 4 ports of 400 Gb/s.
            Gpu("gb200", 2500e12, 186, 8000 * GB, 900 * GB, 50 * GB, 225 * GB, gpus_per_node=4, domain=72),
            # Ada architecture whitepaper: 165.2 TFLOP/s with fp32 accumulation, 24 GB at 1,008 GB/s, PCIe 4.0
            # x16, no NVLink. Nobody sells a standard node: 8 GPUs and one port of 100 Gb/s are assumed.
            Gpu("rtx4090", 165e12, 24, 1008 * GB, 31.5 * GB, 12.5 * GB / 8, 31.5 * GB),
            # RTX Blackwell architecture whitepaper: 209.5 TFLOP/s with fp32 accumulation, 32 GB at 1,792
            # GB/s, PCIe 5.0 x16, no NVLink. The node is assumed as above.
            Gpu("rtx5090", 209e12, 32, 1792 * GB, 63 * GB, 12.5 * GB / 8, 63 * GB),
            # MI300X data sheet: 1,307.4 TFLOP/s, 192 GB at 5.3 TB/s, 7 Infinity Fabric links of 128 GB/s,
            # PCIe 5.0 x16; MI300X platform data sheet: 8 GPUs; one port of 400 Gb/s each is the usual server.
            Gpu("mi300x", 1307e12, 192, 5300 * GB, 448 * GB, 50 * GB, 63 * GB),
        )
    }
)

# What a person's own entry has: field of Gpu, factor from the unit of the key, must it be given.
_KEYS: Mapping[str, tuple[str, float, bool]] = MappingProxyType(
    {
        "peak_tflops": ("peak_flops", 1e12, True),
        "memory_gib": ("memory_gib", 1, True),
        "memory_gb_s": ("memory_bandwidth", GB, True),
        "intra_gb_s": ("intra_link", GB, True),
        "inter_gb_s": ("inter_link", GB, True),
        "host_gb_s": ("host_link", GB, True),
        "gpus_per_node": ("gpus_per_node", 1, False),
        "domain": ("domain", 1, False),
    }
)
SHARES = ("gemm", "attention_forward", "attention_backward")


def find_gpu(name: str, own: Mapping[str, Gpu] = MappingProxyType({})) -> Gpu:
    """Return the GPU of this name, letter case ignored, `own` before ours. Raises ValueError naming those
    there are."""
    gpus = {**GPUS, **own}
    for each, gpu in gpus.items():
        if each.lower() == name.lower():
            return gpu
    near = [each for each in gpus if each.lower().startswith(name.lower())]
    hint = f"did you mean {' or '.join(near)}?" if near else f"legal: {', '.join(gpus)}"
    raise ValueError(f"unknown --gpu {name!r}; {hint} Others come from --hardware FILE.json")


def read_gpus(path: Path) -> dict[str, Gpu]:
    """Return the GPUs of a JSON file: {"my-gpu": {"peak_tflops": 500, "memory_gib": 96, "memory_gb_s": 4000,
    "intra_gb_s": 200, "inter_gb_s": 25, "host_gb_s": 32, "gpus_per_node": 8, "domain": 8}}.

    Links of one GPU in one direction; `domain` (as many as a node, without which 8) GPUs reach each other
    over the intra link. gemm, attention_forward and attention_backward may say which shares of the peak its
    kernels reach: [0.5, 0.7], slow and fast. Raises ValueError naming file, entry and key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--hardware {path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--hardware {path}: not JSON ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(entry, dict) for entry in values.values()):
        raise ValueError(f"--hardware {path}: expected an object of GPUs, each an object of its figures")
    return {name: _read_gpu(name, entry, f"--hardware {path}: {name}") for name, entry in values.items()}


def _read_gpu(name: str, entry: Mapping[str, object], where: str) -> Gpu:
    legal = f"legal: {', '.join((*_KEYS, *SHARES))}"
    for key in entry:
        if key not in _KEYS and key not in SHARES:
            raise ValueError(f"{where}: unknown key {key!r}; {legal}")
    figures: dict[str, float] = {}
    for key, (field_name, unit, needed) in _KEYS.items():
        if key not in entry:
            if needed:
                raise ValueError(f"{where}: {key} is missing; {legal}")
            continue
        whole = not needed
        figures[field_name] = _number(entry[key], f"{where}: {key}", whole) * unit
    shares: dict[str, tuple[float, float]] = {}
    for key in SHARES:
        if key in entry:
            pair = entry[key]
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{where}: {key} is {pair!r}; expected [slow, fast], shares of the peak")
            slow, fast = (_number(value, f"{where}: {key}") for value in pair)
            if not slow <= fast <= 1:
                raise ValueError(f"{where}: {key} is {pair!r}; expected slow <= fast <= 1")
            shares[key] = slow, fast
    node = int(figures.get("gpus_per_node", 8))
    return Gpu(
        name,
        figures["peak_flops"],
        figures["memory_gib"],
        figures["memory_bandwidth"],
        figures["intra_link"],
        figures["inter_link"],
        figures["host_link"],
        node,
        int(figures.get("domain", node)),
        shares,
    )


def _number(value: object, where: str, whole: bool = False) -> float:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ValueError(f"{where} is {value!r}; expected a {'whole ' if whole else ''}number above 0")
    return value
