"""tools/selftest.py as it is, but its ranks are those of broken_rank.py."""

import runpy
from pathlib import Path
from unittest import mock

from megawan import selftest

if __name__ == "__main__":
    with mock.patch.object(selftest, "RANK_MODULE", "tests.grid.broken_rank"):
        runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/selftest.py"), run_name="__main__")
