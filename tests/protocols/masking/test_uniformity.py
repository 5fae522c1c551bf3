"""What a party uploads looks uniform, says nothing of its vector, and is all new each round.

False alarms: every test here fails with probability at most 1e-8 on a right implementation, all together below 1e-6
(randomness is the operating system's, so each run is a new sample).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from choral.protocols.crypto.modular_integers import unpack
from choral.protocols.masking import messages

FALSE_ALARM = 1e-8
LENGTH = 40_000


def uploads(net: Any, vectors: dict[str, Any]) -> dict[str, Any]:
    """The masked vectors of one round, as the server gets them, by party."""
    net.sent.clear()
    net.round(vectors)
    return {
        name: unpack(
            messages.to_server(raw, sender=name, limit=1 << 30).vector[0], net.setup.length, net.setup.modulus_bits
        )
        for way, stage, name, raw in net.sent
        if (way, stage) == ("up", "upload")
    }


def fresh(network: Callable[..., Any], bound: int, n: int = 3) -> Any:
    net = network(n, length=LENGTH, bound=bound)
    net.random = dict.fromkeys((*net.names, "server"), secrets.token_bytes)
    return net.open()


def p_value_of_uniform(values: Any, cells: int) -> float:
    counts = np.bincount(values, minlength=cells)
    assert counts.size == cells
    expected = values.size / cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, cells - 1))


@pytest.mark.parametrize("bound", [1, 40, 2**20, 2**40])
@pytest.mark.parametrize("kind", ["zeros", "ones", "extreme", "ramp"])
def test_a_masked_vector_is_uniform_whatever_is_in_it(network: Callable[..., Any], bound: int, kind: str) -> None:
    vector = {
        "zeros": np.zeros(LENGTH, np.int64),
        "ones": np.ones(LENGTH, np.int64),
        "extreme": np.full(LENGTH, -bound),
        "ramp": np.arange(LENGTH) % (bound + 1),
    }[kind]
    net = fresh(network, bound)
    for name, masked in uploads(net, dict.fromkeys(net.names, vector)).items():
        bits = net.setup.modulus_bits
        tests = [masked & np.array(7, masked.dtype), masked >> np.array(bits - 3, masked.dtype)]  # low bits, high bits
        for values in tests:
            assert p_value_of_uniform(values.astype(np.int64), 8) > FALSE_ALARM / 6, name


def test_the_chi_square_would_notice_a_missing_mask(network: Callable[..., Any]) -> None:
    net = fresh(network, 40)
    masked = uploads(net, dict.fromkeys(net.names, np.arange(LENGTH) % 3))["p0"].astype(np.int64)
    assert p_value_of_uniform((np.arange(LENGTH) % 3) & 7, 8) < FALSE_ALARM
    assert p_value_of_uniform(np.minimum(masked & 7, 6), 8) < FALSE_ALARM  # the top value never drawn, as in Flower


def test_the_masked_vector_is_independent_of_the_input(network: Callable[..., Any]) -> None:
    # A 4 x 4 contingency table of input against masked output: chi-square with 9 degrees of freedom.
    net = fresh(network, 3)
    vector = np.random.default_rng(0).integers(0, 4, LENGTH)
    for masked in uploads(net, dict.fromkeys(net.names, vector)).values():
        table = np.zeros((4, 4))
        np.add.at(table, (vector, (masked & np.array(3, masked.dtype)).astype(np.int64)), 1)
        expected = np.outer(table.sum(1), table.sum(0)) / LENGTH
        assert chi2.sf(((table - expected) ** 2 / expected).sum(), 9) > FALSE_ALARM / 3


def test_everything_changes_each_round(network: Callable[..., Any]) -> None:
    # Equal positions in two rounds of the same vector are Binomial(LENGTH, 2^-b): compare with a Chernoff bound.
    net = fresh(network, 2**20)
    vectors = dict.fromkeys(net.names, np.arange(LENGTH) % 1000)
    first, second = uploads(net, vectors), uploads(net, vectors)
    for name in net.names:
        assert int((first[name] == second[name]).sum()) <= 12  # mean 0.005; more than 12 has probability < 1e-30
    sums = [
        sum(masked.astype(np.uint64) for masked in at.values()) % (1 << net.setup.modulus_bits)
        for at in (first, second)
    ]
    assert int((sums[0] == sums[1]).sum()) <= 12  # the self-masks are new, too: not only the pairwise ones that cancel


def test_the_pairwise_masks_cancel_and_the_self_masks_do_not(network: Callable[..., Any]) -> None:
    net = fresh(network, 2**20)
    vector = np.zeros(LENGTH, np.int64)
    total = sum(masked.astype(np.uint64) for masked in uploads(net, dict.fromkeys(net.names, vector)).values())
    assert p_value_of_uniform((total & np.uint64(7)).astype(np.int64), 8) > FALSE_ALARM
