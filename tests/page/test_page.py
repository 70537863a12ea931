"""What a person sees: the real TensorBoard on a finished run, in a real browser."""

import time
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import ROOT, command
from tests.page.browser import CHROMIUM, DRIVER, Browser, browser, tensorboard, until

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no chromium and chromedriver here (Debian: apt-get install chromium-driver)",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    done = command(
        *(ROOT / "megawan/train.py", "--output", "run", "--steps", 8, "--ema.decay", 0.9),
        *("--validation.every", 2, "--validation.samples", 2, "--sample.every", 4, "--sample.count", 2),
        *("--sample.steps", 2, "--metrics.peak_tflops", 0.1),
        cwd=folder,
        timeout=200,
    )
    assert done.code == 0, done.err
    return folder / "run"


def shown(window: Browser, url: str, *words: str) -> str:
    """Return the text of a page once it holds all these words."""
    window.open("about:blank")
    window.open(url)
    last: list[str] = []

    def there() -> str:
        last[:] = [window.seen()[0]]
        return last[0] if all(word in last[0] for word in words) else ""

    try:
        return str(until(there, 60, "the page"))
    except TimeoutError:
        missing = [word for word in words if word not in last[0]]
        raise AssertionError(f"{url} does not show {missing}; it shows {last[0][:3000]}") from None


def test_tensorboard_shows_the_run(run: Path, tmp_path: Path) -> None:
    with tensorboard(run / "tensorboard", tmp_path) as board, browser(tmp_path) as window:
        shown(
            window,
            f"{board}/#custom_scalars",
            *("1. Is it learning?", "2. Is it fast?", "loss: training, held-out", "seconds a step"),
            *("eval/loss", "train/loss", "perf/mfu", "eval_ema/normalized"),
        )
        time.sleep(3)  # the lines are drawn after their names
        window.screenshot(tmp_path / "custom_scalars.png")
        picture = Image.open(tmp_path / "custom_scalars.png").convert("RGB")
        # TensorBoard's first run is orange: thousands of pixels of lines below the orange bar on top.
        chart = picture.crop((360, 100, picture.width, picture.height))
        orange = sum(
            count
            for count, (red, green, blue) in chart.getcolors(chart.width * chart.height) or []
            if red > 200 and 80 < green < 150 and blue < 120
        )
        assert orange > 1000, f"{orange} pixels of curves"

        text = shown(window, f"{board}/#timeseries", "eval", "train", "data")
        assert "cards" in text and window.seen()[2] > 3
        shown(window, f"{board}/#text", "optim.learning_rate", "layout: 1 ranks")
        shown(window, f"{board}/#hparams", "optim.learning_rate")

        shown(window, f"{board}/#images", "samples/contact_sheet", "samples_ema/00")

        def loaded() -> list[tuple[int, int]]:
            return [size for size in window.seen()[1] if min(size) > 0]

        sizes = until(lambda: len(loaded()) >= 3 and loaded(), 30, "the pictures")
        window.screenshot(tmp_path / "images.png")
        sheet = Image.open(run / "samples/step_0000008/contact_sheet.png").size
        assert sheet in sizes and (64, 64) in sizes, sizes
