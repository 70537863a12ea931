"""tools/benchmark.py compares like with like: the same weights, inputs and loss, and counts what is there."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from megawan import cost
from megawan.benchmark import arms, profiling, report, steps, timing
from megawan.benchmark.arms import Kind
from megawan.benchmark.flops import counted_flops
from megawan.benchmark.memory import peak_bytes, saved_bytes
from megawan.benchmark.problem import GPU_PROBLEMS, Problem, make_inputs
from megawan.benchmark.traffic import compiled_bytes
from megawan.cli import UserError
from megawan.models.attention import choose_backend
from megawan.models.wan import WanModel
from tests.models.activations import kept_bytes
from tests.models.peers import TINY
from tools import benchmark

CPU = torch.device("cpu")
PROBLEM = Problem("tiny", replace(TINY, num_heads=4, text_len=16), (3, 6, 10))
KINDS = [Kind("ours", policy) for policy in ("none", "selective", "attention", "full")] + [
    Kind("diffusers", "none"),
    Kind("diffusers", "full"),
]


def built(problem: Problem, *kinds: Kind) -> list[arms.Arm]:
    source = steps.source_model(problem, CPU, torch.float32)
    inputs = make_inputs(problem, CPU, torch.float32)
    return [arms.build(kind, source, problem, inputs, optimizer=False) for kind in kinds]


@pytest.mark.parametrize("parts", [1, 4])
def test_every_implementation_has_the_same_loss_and_the_same_gradients(parts: int) -> None:
    found = []
    for arm in built(replace(PROBLEM, parts=parts), *KINDS):
        loss = arm.loss()
        loss.backward()
        squares = sum(float(p.grad.square().sum()) for p in arm.model.parameters() if p.grad is not None)
        found.append((float(loss.detach()), squares))
        arm.model.zero_grad(set_to_none=True)
    assert all(pair == pytest.approx(found[0], rel=1e-5) for pair in found)
    assert found[0][1] > 1e-6


def test_saved_bytes_are_those_counted_another_way() -> None:
    ours = built(PROBLEM, *KINDS[:4])
    counted = [saved_bytes(arm.model, arm.loss) for arm in ours]
    assert counted == [kept_bytes(arm.model, arm.loss) for arm in ours]
    assert counted == sorted(counted, reverse=True)
    for arm, saved in zip(ours, counted, strict=True):
        assert peak_bytes(arm.step, CPU) > saved


def test_a_part_of_ulysses_costs_all_implementations_the_same() -> None:
    whole = [counted_flops(arm.step) for arm in built(PROBLEM, KINDS[0], KINDS[4])]
    part = [counted_flops(arm.step) for arm in built(replace(PROBLEM, parts=4), KINDS[0], KINDS[4])]
    extra = 4 * PROBLEM.tokens**2 * PROBLEM.config.dim * PROBLEM.config.num_layers
    # Self-attention of 4 times the tokens with a quarter of the heads; a backward has 5 products for 2.
    assert [after - before for before, after in zip(whole, part, strict=True)] == [extra * 3 * 7 // 2] * 2
    assert replace(PROBLEM, parts=4).flops - PROBLEM.flops == extra * 3 * 3


def test_problems_of_a_gpu_have_the_published_lengths() -> None:
    assert [problem.tokens * problem.parts for problem in GPU_PROBLEMS] == [32_760, 27_280, 37_440]


@pytest.mark.parametrize("problem", GPU_PROBLEMS, ids=lambda problem: problem.name)
def test_the_steps_of_a_gpu_fit_together(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their sizes, two blocks deep, on the meta device: shapes, dtypes and devices, no numbers."""
    kernel = choose_backend("auto", "cuda", torch.bfloat16, 128, True, (9, 0)).kernel("")
    monkeypatch.setattr(arms, "select_attention", lambda *given, **more: kernel)
    cut = replace(problem, config=replace(problem.config, num_layers=2))
    meta = torch.device("meta")
    with meta:
        source = WanModel(cut.config).bfloat16()
    inputs = make_inputs(cut, meta, torch.bfloat16)
    for kind in steps.kinds(cost.POLICIES, arms.available_peers(), [False]):
        arm = arms.build(kind, source, cut, inputs, optimizer=True)
        assert arm.step().device == meta
        owned = {id(parameter) for parameter in source.parameters()}
        assert {id(parameter) for parameter in arm.model.parameters()} == owned


def test_compiled_code_moves_what_its_kernels_read_and_write() -> None:
    x, weight = torch.randn(64, 128), torch.randn(128, 128)
    step = torch.compile(lambda a: torch.relu((a * 2) @ weight) + 1)
    for _ in range(2):  # what was compiled before counts again; the product aside
        assert compiled_bytes(lambda: [step(x), step(x)]) == 4 * x.nbytes


def test_a_gpus_times_are_its_kernels_each_once() -> None:
    """The operator that launched a kernel has its time too, and so has a name over both."""

    def event(key: str, device: float, kind: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            device_type=kind,
            is_user_annotation=annotation,
            self_cpu_time_total=7e6,
            self_device_time_total=device * 1e6,
        )

    launched = [event(name, 1.0, DeviceType.CPU) for name in ("aten::mm", "aten::mul")]
    kernels = [
        event("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 2.0, DeviceType.CUDA),
        event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", 3.0, DeviceType.CUDA),
        event("triton_poi_fused__scaled_dot_product_cudnn_attention_clone_4", 0.5, DeviceType.CUDA),
        event("void at::native::vectorized_elementwise_kernel<4>", 0.25, DeviceType.CUDA),
    ]
    span = event("Optimizer.step#AdamW.step", 9.0, DeviceType.CUDA, annotation=True)
    found = profiling.sorted_out([*launched, *kernels, span], cuda=True)
    assert (found.products, found.rest) == (5.0, 0.75)
    assert [name.split("_")[0] for name, _ in found.longest] == ["triton", "void at::native::vectorized"]
    assert profiling.sorted_out(launched, cuda=False).products == 7.0


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()
    names = ("a", "b", "c")
    timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in names},  # type: ignore[misc]
        repetitions=3,
        warm_up=1,
        device=CPU,
    )
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    clock = iter(range(100))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls.clear()
    seconds = timing.interleaved(
        {"a": lambda: calls.append("a")}, repetitions=2, warm_up=0, device=CPU, at_least=3
    )
    assert (len(calls), seconds) == (6, {"a": [1.0, 1.0]})  # three seconds of one call each, a round
    # Twice as slow throughout, on a machine that slows down tenfold half way.
    assert timing.paired_ratio([2, 2, 20, 20], [1, 1, 10, 10]) == timing.Spread(2, 2, 2)


def test_a_step_is_timed_then_examined() -> None:
    """What a block adds between products is told where nothing is recomputed, once the times are out."""
    early: list[set[str]] = []
    table = steps.measure(
        PROBLEM,
        torch.float32,
        steps.kinds(["none", "full"], [], [False]),
        device=CPU,
        repetitions=1,
        warm_up=0,
        optimizer=True,
        profiled=True,
        tick=lambda: None,
        timed=lambda table: early.append({key for row in table.rows for key in row}),
    )
    plain, full = table.rows
    assert (plain["step"], full["step"]) == ("ours none", "ours full")
    assert plain["vectors a token and block"] > full["vectors a token and block"] > 0
    assert "of it a block" in plain and "of it a block" not in full
    assert plain["vectors a block moves"] > 100 and "vectors a block moves" not in full
    assert early == [{"step", "s", "quartiles", "TFLOP/s"}]


def test_the_files_hold_every_row(tmp_path: Path) -> None:
    table = report.Table("Rows", [{"step": "a", "s": 0.12345}, {"step": "b", "MFU": "50 %"}], note="Note.")
    json_file, text_file = report.write(tmp_path / "new", "cpu", [table], "python tools/benchmark.py")
    assert json.loads(json_file.read_text())["tables"][0]["rows"] == table.rows
    text = text_file.read_text()
    assert "| a | 0.1235 |  |" in text and "| b |  | 50 % |" in text and "- commit: " in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite", "gpu"], "needs a CUDA GPU"),
        (["--suite", "cpu", "--problems", "huge"], "legal for --suite cpu: small"),
        (["--suite", "cpu", "--repetitions", "0"], "must be 1 or more"),
        (["--suite", "kernels", "--only", "disk"], "belongs to --suite cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        benchmark.main([*flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
