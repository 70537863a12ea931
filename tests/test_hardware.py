"""The table of GPUs and what is read from a person's own."""

import pytest

from megawan import hardware


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
