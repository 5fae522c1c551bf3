"""Our Renyi divergences of sampled Gaussians are dp-accounting's to the last bit, and `choral budget` needs it not."""

from __future__ import annotations

import math
import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from choral.privacy.accounting.renyi import FEW_ORDERS, RENYI_ORDERS, dp_event_of, quiet
from choral.privacy.loss_distributions.sampled_renyi import divergences, epsilon_of, gaussian_noise

STEPS = [(0.01, 0.8), (0.3, 5.0), (1e-5, 0.4), (0.9, 1.1), (1.0, 2.5), (1e-3, 60.0), (0.02, 0.2)]


@pytest.mark.parametrize(("rate", "noise"), STEPS)
def test_divergences_and_their_epsilon_are_those_of_dp_accounting(rate: float, noise: float) -> None:
    orders = tuple(map(float, (*RENYI_ORDERS[::7], *FEW_ORDERS, 1.005)))
    with quiet():
        theirs = RdpAccountant(orders).compose(dp_event_of(rate, noise)).rdp
        ours = divergences(rate, noise, orders)
        assert ours.tolist() == theirs.tolist()
        for steps, delta in ((1, 1e-5), (2000, 1e-10), (7, 0.3)):
            assert epsilon_of(orders, steps * ours, delta) == compute_epsilon(orders, steps * theirs, delta)[0]


def test_what_is_no_number_is_no_bound() -> None:
    assert epsilon_of((2.0, 3.0), np.array([math.nan, math.inf]), 1e-5) == math.inf
    assert epsilon_of((2.0, 3.0), np.array([math.nan, 1.0]), 1e-5) == compute_epsilon((3.0,), (1.0,), 1e-5)[0]
    assert epsilon_of((2.0,), np.array([0.0]), 1e-5) == 0.0


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.2])
def test_the_noise_of_one_release_is_that_of_dp_accounting(epsilon: float, delta: float) -> None:
    theirs = dp_accounting.get_sigma_gaussian(epsilon, delta, tol=1e-15)
    assert gaussian_noise(epsilon, delta) == pytest.approx(theirs, rel=1e-9)


def test_a_budget_loads_no_other_accountant_and_says_so() -> None:
    code = """
import sys
from choral.cli.command_line import main
main("budget --epsilon 3 --delta 1e-5 --sample-rate 0.01 --steps 2000".split())
print(sorted({name for name in sys.modules if name in ("dp_accounting", "torch", "scipy.stats", "scipy.optimize")}))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"
    assert "accountant        PLD, cross-checked by RDP\n" in said
