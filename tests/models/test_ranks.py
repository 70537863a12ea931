"""One forward for one rank and many: four gloo processes give what one gives."""

from tests.distributed import run_distributed


def test_four_ranks_give_the_output_and_gradients_of_one() -> None:
    for cases in run_distributed(
        "tests.models.rank_workers:layouts", 4, arguments={"world_size": 4}, timeout=110
    ):
        assert len(cases) == 3 * 3 * 3
        for name, output, gradient in cases:
            assert output < 1e-11 and gradient < 1e-11, (name, output, gradient)
