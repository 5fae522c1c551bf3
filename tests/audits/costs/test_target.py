"""What it costs to reach a level, against the history read line by line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from choral.audits import Comparison, compare
from choral.audits.costs.bills import bill
from choral.audits.costs.prices import read_prices
from choral.audits.costs.target import costs_to_target
from choral.errors import ConfigError
from choral.trainers import Run

MakeRun = Callable[..., Run]
PRICES = read_prices()


def scored(run: Run, scores: list[float], metric: str = "accuracy") -> Run:
    """The run's first rounds, with these scores from round 0 on."""
    history = [
        msgspec.structs.replace(entry, metrics={metric: score})
        for entry, score in zip(run.history, scores, strict=False)
    ]
    return dataclasses.replace(run, history=tuple(history))


@pytest.fixture
def arms(make_run: MakeRun) -> dict[str, list[Run]]:
    return {
        "cloud": [scored(make_run("cloud", seed), [0.1, 0.5, 0.8, 0.9]) for seed in (0, 1)],
        "fast": [scored(make_run("federated", 0), [0.1, 0.86, 0.7, 0.9]), scored(make_run("federated", 1), [0.1] * 4)],
        "never": [scored(make_run("federated-masked", seed), [0.1, 0.2, 0.3, 0.84]) for seed in (0, 1)],
    }


def test_the_first_round_that_is_there_counts_with_the_bill_until_then(arms: dict[str, list[Run]]) -> None:
    found = costs_to_target(arms, "accuracy", "cloud", PRICES, 0.85)
    assert found is not None
    assert (found.level, found.stated) == (0.85, True)
    rounds = {name: [each.round for each in runs] for name, runs in found.arms.items()}
    assert rounds == {"cloud": [3, 3], "fast": [1, None], "never": [None, None]}
    first, lost = found.arms["fast"]
    until = dataclasses.replace(arms["fast"][0], history=arms["fast"][0].history[:2])
    made = bill("fast", [until], PRICES)
    assert made is not None
    assert (first.bytes, first.seconds) == (made.bytes_up + made.bytes_down, made.seconds)
    assert (first.usd, first.joules) == (made.usd, made.joules)
    assert first.bytes == sum(entry.bytes_up + entry.bytes_down for entry in arms["fast"][0].history[:2])
    assert (lost.bytes, lost.seconds, lost.usd, lost.joules, lost.epsilon) == (None,) * 5


def test_without_a_level_it_is_that_of_the_baselines_gain(arms: dict[str, list[Run]]) -> None:
    found = costs_to_target(arms, "accuracy", "cloud", PRICES)
    assert found is not None
    assert found.level == pytest.approx(0.1 + 0.95 * 0.8)
    assert not found.stated
    flat = {"cloud": [scored(run, [0.4, 0.3, 0.4, 0.4]) for run in arms["cloud"]]}
    assert costs_to_target(flat, "accuracy", "cloud", PRICES) is None


def test_where_less_is_better_at_most_the_level_counts(make_run: MakeRun) -> None:
    run = scored(make_run("cloud"), [0.9, 0.5, 0.3, 0.2], "test error")
    found = costs_to_target({"cloud": [run]}, "test error", "cloud", PRICES, 0.3)
    assert found is not None
    assert [each.round for each in found.arms["cloud"]] == [2]
    own = costs_to_target({"cloud": [run]}, "test error", "cloud", PRICES)
    assert own is not None
    assert own.level == pytest.approx(0.9 - 0.95 * 0.7)


@pytest.mark.parametrize("level", [float("nan"), float("inf")])
def test_a_level_that_is_no_number_is_refused(level: float, arms: dict[str, list[Run]]) -> None:
    with pytest.raises(ConfigError, match="target is"):
        costs_to_target(arms, "accuracy", "cloud", PRICES, level)


def test_the_report_says_it_and_says_never(make_run: MakeRun, tmp_path: Path) -> None:
    runs = {"cloud": make_run("cloud"), "federated": make_run("federated")}
    report = compare(runs, target=2.0)
    assert Comparison.load(report.save(tmp_path / "r.json")).costs == report.costs
    page = report.save(tmp_path / "r.html").read_text("utf-8")
    assert "What it costs to reach" in page
    assert page.count(">never<") == 2
    page = compare(runs).save(tmp_path / "s.html").read_text("utf-8")
    assert "95 % of what the baseline gained" in page
    assert ">1 of 1<" in page
