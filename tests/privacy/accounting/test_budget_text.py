"""Each number that `choral budget` prints, read back, costs at most what was promised."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.audits.findings import text
from choral.cli.command_line import main
from choral.privacy.accounting import record_level
from choral.privacy.accounting.budget import at_least, at_most
from choral.privacy.accounting.events import PoissonSampledGaussian


def printed(capsys: pytest.CaptureFixture[str], **words: float) -> dict[str, float]:
    capsys.readouterr()
    flags = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", repr(value))]
    assert main(["budget", *flags]) == 0
    said = capsys.readouterr().out
    patterns = {
        "noise": r"noise multiplier +(\S+)", "epsilon": r"epsilon +(\S+)", "rdp": r"bound: (\S+)\)",
        "delta": r"delta +(\S+)", "steps": r"steps +(\d+)", "rate": r"sample rate (\S+),",
    }  # fmt: skip
    return {name: float(re.search(pattern, said).group(1)) for name, pattern in patterns.items()}  # type: ignore[union-attr]


def priced(found: dict[str, float]) -> float:
    event = PoissonSampledGaussian(
        sample_rate=found["rate"], noise_multiplier=found["noise"], steps=int(found["steps"])
    )
    return record_level.epsilon([event], found["delta"])


PRINTED = {  # while the search computed both directions on every grid, and RDP was dp-accounting's
    "--epsilon 3 --delta 1e-5 --sample-rate 0.01 --steps 2000": ("0.9304", "3.0000", "3.3510", "2000", "0.01"),
    "--epsilon 0.5 --delta 1e-5 --sample-rate 0.1 --steps 100": ("7.2137", "0.5000", "0.5514", "100", "0.1"),
    "--noise-multiplier 1.1 --delta 1e-5 --sample-rate 0.02 --steps 1500": (
        "1.1000", "4.0227", "4.4128", "1500", "0.02",
    ),
    "--epsilon 2 --delta 1e-5 --noise-multiplier 1.3 --steps 500": ("1.3000", "2.0000", "2.2151", "500", "0.0230651"),
}  # fmt: skip


@pytest.mark.parametrize("words", PRINTED)
def test_every_digit_is_as_it_was(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", *words.split()]) == 0
    noise, epsilon, rdp, steps, rate = PRINTED[words]
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"noise multiplier  {noise}",
        f"epsilon           {epsilon}  (PLD; RDP, the looser bound: {rdp})",
        "delta             1e-05",
        f"steps             {steps} at sample rate {rate}, Poisson sampling",
    ]


def test_what_another_accountant_says_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["budget", "--epsilon", "3", "--delta", "1e-5", "--sample-rate", "0.01", "--steps", "2000"]
    assert main([*words, "--check"]) == 0
    assert "cross-checked by RDP and dp-accounting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(1.0, 0.01, 1000), (8.0, 0.123456789, 77), (0.05, 0.004, 3000), (1e-6, 0.01, 1000)]
)
def test_printed_noise_costs_no_more_than_was_promised(
    capsys: pytest.CaptureFixture[str], epsilon: float, rate: float, steps: int
) -> None:
    found = printed(capsys, delta=1e-5, epsilon=epsilon, sample_rate=rate, steps=steps)
    assert 0.999 * epsilon <= priced(found) <= found["epsilon"] <= epsilon * (1 + 1e-3)
    assert priced(found) <= epsilon
    assert found["rate"] == rate


@pytest.mark.parametrize(("epsilon", "noise"), [(1.0, 1.3), (3.3, 0.7777777)])
def test_printed_rates_steps_and_costs_keep_the_promise(
    capsys: pytest.CaptureFixture[str], epsilon: float, noise: float
) -> None:
    for words in ({"steps": 500}, {"epochs": 7}, {"sample_rate": 0.0123456789}):
        found = printed(capsys, delta=1e-6, epsilon=epsilon, noise_multiplier=noise, **words)
        assert priced(found) <= epsilon
        assert found["noise"] == noise
    found = printed(capsys, delta=1.23456789e-6, noise_multiplier=noise, sample_rate=0.0123456789, steps=345)
    assert found["delta"] == 1.23456789e-6
    assert priced(found) <= found["epsilon"] <= found["rdp"]


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-12, 1e12))
def test_bounds_are_rounded_to_the_safe_side(value: float) -> None:
    assert at_most(value, 6)
    assert float(at_most(value)) <= value <= float(at_least(value))
    assert float(at_least(value)) <= value * 1.001 + 1e-4
    assert float(text.at_least(value)) <= value <= float(text.cost(value))


def test_a_promise_that_nobody_makes_is_answered_in_bounded_time(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, delta=1e-5, epsilon=1e6, sample_rate=0.5, steps=10**6)
    assert 0.99e6 < found["epsilon"] <= 1e6
