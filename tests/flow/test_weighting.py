"""Weightings by name, and their renormalisation inside a window."""

import pytest
import torch

from megawan.flow.schedule import FlowMatchScheduler, shifted_sigmas
from megawan.flow.weighting import WEIGHTINGS, gaussian, get_weighting, uniform, window_scale


def test_the_bell_is_highest_in_the_middle_and_zero_only_at_the_first_point() -> None:
    weights = gaussian(shifted_sigmas(1000, 5.0))
    assert float(weights[0]) == 0
    assert bool((weights[1:] > 0).all())
    assert int(weights.argmax()) == 833  # t = 500.6, nearest to 500
    assert bool((weights[:833].diff() > 0).all()) and bool((weights[833:].diff() < 0).all())


def test_uniform_is_one_everywhere_even_for_one_timestep() -> None:
    assert uniform(shifted_sigmas(7, 3.0)).tolist() == [1.0] * 7
    flow = FlowMatchScheduler(weighting="uniform")
    flow.set_timesteps(1, training=True)
    assert float(flow.training_weight(1000.0)) == 1.0


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_a_window_scale_makes_the_mean_one(name: str) -> None:
    weights = get_weighting(name)(shifted_sigmas(1000, 5.0))
    probability = torch.zeros(1000, dtype=torch.float64)
    probability[:417] = 1 / 417
    scaled = weights * window_scale(weights, probability)
    assert float(scaled[:417].double().mean()) == pytest.approx(1, abs=1e-6)


def test_a_window_without_weight_cannot_be_scaled() -> None:
    weights = gaussian(shifted_sigmas(1000, 5.0))
    only_first = torch.zeros(1000, dtype=torch.float64)
    only_first[0] = 1
    with pytest.raises(ValueError, match="all weights inside the window are 0"):
        window_scale(weights, only_first)


def test_an_unknown_weighting_lists_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="unknown weighting 'bell'; legal: gaussian, uniform"):
        FlowMatchScheduler(weighting="bell")
