"""What --model.recompute auto decides before a run, and what a plan says of memory."""

import pytest

from megawan import cost
from megawan.cli import UserError
from megawan.plan import GIB, Plan, cost_layout, model_shape
from tests.training import plan_of

T2V_14B = ("--variant", "t2v-14B", "--precision", "bf16", "--num_frames", "81")
SD, HD = ("--height", "480", "--width", "832"), ("--height", "720", "--width", "1280")
EIGHT = (*T2V_14B, "--ulysses_degree", "8")


def auto(budget: float, *argv: str, world: int = 8) -> Plan:
    return plan_of(world, *argv, "--model.recompute", "auto", "--model.memory_budget_gb", str(budget))


def line(plan: Plan, name: str) -> str:
    (found,) = [line for line in plan.describe() if line.startswith(f"{name}: ")]
    return found


@pytest.mark.parametrize(
    ("size", "budget", "chosen"), [(SD, 72, "none"), (HD, 72, "attention:9,selective"), (HD, 126, "none")]
)
def test_a_14b_step_fits_eight_gpus(size: tuple[str, ...], budget: float, chosen: str) -> None:
    plan = auto(budget, *EIGHT, *size)
    assert plan.recompute == chosen
    assert f"ZeRO stage 3, bf16, recompute {chosen} (auto)" in line(plan, "layout")
    memory = line(plan, "memory")
    assert float(memory.split()[1]) <= budget and "model states 26.6 + kept activations" in memory
    choice = cost.cheapest_recompute(
        model_shape(plan.variant.config),
        75_600 if size is HD else 32_760,
        budget * GIB,
        cost_layout(plan.config, plan.topology, plan.deepspeed),
    )
    assert choice is not None and choice.text == chosen


def test_a_smaller_budget_recomputes_more_and_offloading_less() -> None:
    shares = []
    for budget in (72, 60, 50, 40):
        shares.append(float(line(auto(budget, *EIGHT, *HD), "memory").split("adds ")[1].split("%")[0]))
    assert shares == sorted(shares) and shares[0] < shares[-1] < 34
    offloaded = auto(45, *EIGHT, *HD, "--model.offload_activations")
    assert "recompute selective:34 (auto), offloaded" in line(offloaded, "layout") and offloaded.offload
    roomy = auto(126, *EIGHT, *HD, "--model.offload_activations")
    assert line(roomy, "layout").endswith("recompute none (auto)") and not roomy.offload


@pytest.mark.parametrize(
    ("budget", "world", "argv", "says"),
    [
        (
            72,
            8,
            (*T2V_14B, *HD),
            "8 ranks with --parallel.ulysses_degree 2 --parallel.ring_degree 1 would fit",
        ),
        (
            30,
            8,
            (*EIGHT, *HD),
            "16 ranks with --parallel.ulysses_degree 4 --parallel.ring_degree 1 would fit",
        ),
        (1, 1, (*T2V_14B, *SD), "no layout of up to 128 ranks would fit"),
    ],
)
def test_what_fits_nowhere_names_the_layout_that_would(
    budget: float, world: int, argv: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        auto(budget, *argv, world=world)
    message = str(caught.value)
    assert message.startswith("recompute auto: even full needs ") and says in message
    assert f"and the budget is {budget} GiB; " in message and "\n" not in message


def test_a_policy_is_held_to_the_budget_that_is_given() -> None:
    asked = (*EIGHT, *HD, "--model.recompute", "none", "--model.memory_budget_gb", "72")
    with pytest.raises(UserError, match="recompute none needs 108 GiB .* attention:9,selective would fit"):
        plan_of(8, *asked)
    assert plan_of(8, *asked, "--model.recompute", "full").recompute == "full"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--model.recompute", "auto"), "auto needs --model.memory_budget_gb: there is no GPU to ask"),
        (
            ("--model.recompute", "auto", "--model.memory_budget_gb", "0"),
            "memory_budget_gb 0.0 must be above 0",
        ),
        (
            ("--model.recompute", "auto:3"),
            "recompute 'auto:3' is not legal for 6 blocks; legal: none, selective",
        ),
        (("--model.offload_activations",), "offloading what is kept needs selective, attention or full"),
    ],
)
def test_what_cannot_be_planned_is_refused(argv: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match="recompute|memory_budget_gb") as caught:
        plan_of(1, *argv)
    assert says in str(caught.value)


def test_policies_that_keep_results_ask_for_a_kernel_that_gives_them() -> None:
    for policy, needed in (("none", False), ("full", False), ("attention:1", True), ("selective", True)):
        assert plan_of(1, "--model.recompute", policy).need_lse is needed
    assert plan_of(2, "--parallel.ring_degree", "2").need_lse
