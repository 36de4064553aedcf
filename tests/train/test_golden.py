"""Ten recorded losses come back.

Within 1e-4: on another CPU stock GEMMs add in another order, which moves losses of about 5 by some 1e-6 and, after
ten steps, by some 1e-5; another mask, pair, weight or dropout bit moves them by more than 1e-3.
"""

import json

import pytest
from record_golden import COMMAND, FILE, ten_losses


def test_ten_losses(tmp_path):
    recorded = json.loads(FILE.read_text())
    assert recorded["command"] == COMMAND
    assert len(recorded["losses"]) == 10
    assert ten_losses(tmp_path) == pytest.approx(recorded["losses"], rel=0, abs=1e-4)
