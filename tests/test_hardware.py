"""The table of GPUs and what is read from a person's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from megawan import hardware, planning


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peak_by_device_name(name: str, teraflops: float) -> None:
    assert hardware.peak_flops(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA A10G", "Tesla V100-SXM2-32GB", "cpu", ""])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert hardware.peak_flops(name) is None


def test_the_two_tables_agree() -> None:
    for name, gpu in hardware.GPUS.items():
        family = name.partition("-")[0].upper().replace("RTX", "RTX ")
        assert gpu.peak_flops == hardware.peak_flops(f"NVIDIA {family}")


MINE: dict[str, Any] = {
    "peak_tflops": 500,
    "memory_gib": 96,
    "memory_gb_s": 4000,
    "intra_gb_s": 200,
    "inter_gb_s": 25,
    "host_gb_s": 32,
}


def own(tmp_path: Path, entry: Any) -> dict[str, hardware.Gpu]:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"Mine": entry}))
    return hardware.read_gpus(file)


def test_a_gpu_of_ones_own_is_planned_for(tmp_path: Path) -> None:
    gpus = own(tmp_path, MINE | {"gpus_per_node": 4, "gemm": [0.4, 0.5], "attention_forward": [0.2, 0.3]})
    gpu = hardware.find_gpu("mine", gpus)
    assert (gpu.peak_flops, gpu.memory_gib, gpu.intra_link, gpu.domain) == (500e12, 96, 200e9, 4)
    assert hardware.find_gpu("H100", gpus) == hardware.GPUS["h100"]
    plain = hardware.find_gpu("mine", own(tmp_path, MINE | {"gpus_per_node": 4}))
    slower, usual = (
        planning.rows(planning.ask("t2v-1.3B", 81, 480, 832, 4, each))[0] for each in (gpu, plain)
    )
    assert slower.fast.products > usual.fast.products and slower.slow.products > usual.slow.products
    assert slower.wire == usual.wire


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (MINE | {"peak_tflop": 1}, "Mine: unknown key 'peak_tflop'; legal: peak_tflops, memory_gib, "),
        ({"peak_tflops": 1}, "Mine: memory_gib is missing; legal: "),
        (MINE | {"memory_gib": 0}, "Mine: memory_gib is 0; expected a number above 0"),
        (MINE | {"memory_gib": True}, "Mine: memory_gib is True; expected a number above 0"),
        (MINE | {"inter_gb_s": float("nan")}, "Mine: inter_gb_s is nan; expected a number above 0"),
        (MINE | {"domain": 2.5}, "Mine: domain is 2.5; expected a whole number above 0"),
        (MINE | {"gemm": 0.5}, "Mine: gemm is 0.5; expected [slow, fast]"),
        (MINE | {"gemm": [0.7, 0.5]}, "Mine: gemm is [0.7, 0.5]; expected slow <= fast <= 1"),
        (3, "expected an object of GPUs, each an object of its figures"),
    ],
)
def test_a_wrong_entry_is_named(entry: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine.json") as caught:
        own(tmp_path, entry)
    assert says in str(caught.value)
