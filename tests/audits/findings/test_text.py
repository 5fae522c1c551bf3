"""Numbers in words: rounded the honest way, and never a wrong sign or unit."""

from __future__ import annotations

import math

import pytest

from choral.audits.findings.text import amount, cost, duration, energy, money, plus_minus, power, score, signed


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [(7.9961, "8.00"), (8.0, "8.00"), (8.0001, "8.01"), (0.5, "0.50"), (0.01234, "0.0124"), (0, "0.00")],
)
def test_epsilon_is_rounded_up(epsilon: float, shown: str) -> None:
    assert cost(epsilon) == shown
    assert float(shown) >= epsilon


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e-5, "10⁻⁵"), (2.5e-6, "2.5 × 10⁻⁶"), (3e-12, "3 × 10⁻¹²"), (0.02, "0.02"), (0.0, "0"), (math.inf, "inf")],
)
def test_small_numbers(value: float, shown: str) -> None:
    assert power(value) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_950, "100 kB"), (999_400, "999 kB"),
     (999_600, "1.0 MB"), (37_000_000, "37.0 MB"), (2.5e9, "2.5 GB"), (7e12, "7.0 TB")],
)  # fmt: skip
def test_bytes(count: float | None, shown: str) -> None:
    assert amount(count).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "40 ms"),
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (61.0, "1 min 01 s"),
        (3600, "1.0 h"),
        (9000, "2.5 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == shown


def test_scores_and_differences() -> None:
    assert score(0.9716, "accuracy") == "97.2\u00a0%"
    assert score(-1.5, "loss") == "−1.5"
    assert signed(-0.0123, "accuracy") == "−1.2"
    assert signed(0.0123, "accuracy") == "+1.2"
    assert signed(-0.0001, "accuracy") == "0.0"  # no sign where nothing is left to sign
    assert signed(0.25, "loss") == "+0.25"
    assert plus_minus(0.0123, "accuracy") == " ± 1.2"
    assert plus_minus(None, "accuracy") == ""


@pytest.mark.parametrize(
    ("usd", "shown"),
    [(0.0, "0.00 USD"), (4.68e-5, "0.000047 USD"), (0.0013, "0.0013 USD"), (0.25, "0.25 USD"), (12345.6, "12,346 USD")],
)
def test_money(usd: float, shown: str) -> None:
    assert money(usd).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(("joules", "shown"), [(7.4, "7.4 J"), (1090.0, "1.09 kJ"), (7.2e6, "2 kWh")])
def test_energy(joules: float, shown: str) -> None:
    assert energy(joules).replace("\u00a0", " ") == shown
