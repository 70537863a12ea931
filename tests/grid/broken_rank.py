"""A rank of tools/selftest.py with one problem and a fault: the word BROKEN in the environment says which."""

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

from megawan import parity, selftest
from megawan.selftest import Bench, Problem
from tests.grid.faulty import loss_without_factor


def hang(self: Bench, problem: Problem, layout: object, dtype: object) -> None:
    """Wait for ever, as in a collective that another rank never joins."""
    Path(f"pid-{os.getpid()}").touch()
    time.sleep(1000)


if __name__ == "__main__":
    fault = (
        mock.patch.object(parity, "flow_loss", loss_without_factor)
        if os.environ["BROKEN"] == "loss"
        else mock.patch.object(Bench, "plain", hang)
    )
    with fault, mock.patch.object(selftest, "PROBLEMS", selftest.PROBLEMS[-1:]):
        selftest.run_rank(json.loads(sys.argv[1]))
