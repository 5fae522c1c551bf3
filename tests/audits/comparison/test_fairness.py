"""Worst party and spread, against numpy's own figures; what must not be averaged is refused; no party is named."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from choral.audits import Comparison, compare
from choral.audits.comparison.fairness import _by_chance
from choral.audits.report.html import comparison_page
from choral.audits.report.markdown import comparison_markdown
from choral.errors import ConfigError, DataError
from choral.trainers import Run
from choral.trainers.task.per_party import NOTE, PerParty

Arms = dict[str, list[Run]]
PARTIES = 12


def shares(arm: int, seed: int, records: list[int]) -> list[float]:
    """Of each party, how many of its records were right."""
    random = np.random.default_rng((arm, seed))
    return [int(random.binomial(count, 0.9 - 0.05 * arm)) / count for count in records]


def with_parties(run: Run, arm: int, metric: str = "accuracy", **changes: object) -> Run:
    """The run with numbers of twelve parties of five or more records each, and a thirteenth of four."""
    records = [5 + 3 * number for number in range(PARTIES)]
    values = shares(arm, run.info.seed, records)
    fields: dict[str, object] = {
        "records": {f"Ward {n}": count for n, count in enumerate(records)} | {"Ward 12": 4},
        "metrics": {f"Ward {n}": {metric: value, "loss": 1 - value} for n, value in enumerate(values)},
    }
    return replace(run, info=msgspec.structs.replace(run.info, per_party=PerParty(**(fields | changes))))


@pytest.fixture
def fair(arms: Arms) -> Arms:
    return {name: [with_parties(run, place) for run in runs] for place, (name, runs) in enumerate(arms.items())}


def measures(report: Comparison, arm: str) -> dict[str, object]:
    found = next(each for each in report.arms if each.name == arm).fairness
    assert found is not None
    return {measure.name: measure for measure in found.measures}


ORACLES = {
    "worst": np.min,
    "tenth": lambda values: np.percentile(values, 10),
    "mean": np.mean,
    "deviation": np.std,
    "range": np.ptp,
}


@pytest.mark.parametrize("name", ORACLES)
def test_each_measure_is_numpys_of_the_parties_numbers_with_students_interval_over_seeds(fair: Arms, name: str) -> None:
    report = compare(fair)
    for place, arm in enumerate(fair):
        records = [5 + 3 * number for number in range(PARTIES)]
        ours = [float(ORACLES[name](shares(place, seed, records))) for seed in range(3)]
        theirs = [float(ORACLES[name](shares(0, seed, records))) for seed in range(3)]
        found = measures(report, arm)[name]
        assert found.estimate.values == pytest.approx(ours)
        low, high = stats.t.interval(0.95, 2, loc=np.mean(ours), scale=stats.sem(ours))
        assert (found.estimate.low, found.estimate.high) == pytest.approx((max(low, 0.0), min(high, 1.0)))  # a share
        if arm == "cloud":
            assert found.difference is None
            continue
        oracle = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert found.difference.paired
        assert (found.difference.estimate.low, found.difference.estimate.high) == pytest.approx(
            (oracle.low, oracle.high)
        )


def test_facts_beside_the_measures(fair: Arms) -> None:
    found = compare(fair).arms[0].fairness
    assert (found.parties, found.listed, found.records, found.least, found.note) == (13, 12, 5, 5, NOTE)


def test_what_chance_alone_gives_is_estimated_without_bias() -> None:
    """2,000 parties-sets that are served equally well: the mean of the estimated variance is that of the real one.

    The standard error of the compared means is below 1 % of them; 5 % are allowed.
    """
    random, records = np.random.default_rng(0), [5, 8, 30, 11]
    real, estimated = [], []
    for _ in range(2000):
        values = [random.binomial(count, 0.8) / count for count in records]
        per_party = PerParty(
            records={str(n): count for n, count in enumerate(records)},
            metrics={str(n): {"accuracy": value} for n, value in enumerate(values)},
        )
        estimated.append(_by_chance([per_party], "accuracy") ** 2)
        real.append(np.var(values))
    assert np.mean(estimated) == pytest.approx(np.mean(real), rel=0.05)


def test_without_numbers_per_party_there_is_no_such_section(arms: Arms) -> None:
    report = compare(arms)
    assert all(arm.fairness is None for arm in report.arms)
    assert "serves worst" not in comparison_page(report) + comparison_markdown(report)


def test_a_baseline_without_numbers_leaves_the_difference_open(fair: Arms, arms: Arms) -> None:
    report = compare(fair | {"cloud": arms["cloud"]})
    assert all(measure.difference is None for measure in measures(report, "federated").values())
    assert comparison_page(report)


def test_where_less_is_better_the_worst_party_is_the_greatest(fair: Arms) -> None:
    report = compare(fair, metric="loss")
    assert report.arms[0].fairness.by_chance is None
    values = [1 - share for share in shares(0, 0, [5 + 3 * number for number in range(PARTIES)])]
    found = measures(report, "cloud")
    assert found["worst"].estimate.values[0] == pytest.approx(max(values))
    assert found["tenth"].estimate.values[0] == pytest.approx(np.percentile(values, 90))
    assert found["deviation"].estimate.values[0] == pytest.approx(np.std(values))
    assert "Ninetieth percentile" in comparison_page(report)
    assert "Tenth percentile" not in comparison_page(report)


def test_the_first_compared_metric_that_parties_have_is_theirs(arms: Arms) -> None:
    of_error = {
        name: [with_parties(run, place, "error") for run in runs] for place, (name, runs) in enumerate(arms.items())
    }
    report = compare(of_error, metric="accuracy", also=("loss",))
    assert {arm.fairness.metric for arm in report.arms} == {"loss"}
    assert "Whom the model serves worst: loss at each party" in comparison_page(report)
    assert "loss at each party" in comparison_markdown(report)


def test_no_party_is_named_in_any_form_of_the_report(fair: Arms, tmp_path: Path) -> None:
    report = compare(fair)
    console = Console(file=io.StringIO(), width=400)
    report.print(console)
    forms = [
        report.save(tmp_path / f"report{suffix}").read_text(encoding="utf-8") for suffix in (".json", ".html", ".md")
    ]
    for form in [*forms, console.file.getvalue()]:
        assert "Ward" not in form
        assert re.search("worst", form, re.IGNORECASE)
    for form in forms:
        assert "in the clear and without noise" in form
    assert Comparison.load(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda run: replace(run, info=msgspec.structs.replace(run.info, per_party=None)),
            ConfigError,
            "seed 1 has no",
        ),
        (lambda run: with_parties(run, 2, "error"), ConfigError, "no 'accuracy' everywhere, but loss"),
        (
            lambda run: with_parties(run, 2, metrics={"Ward 0": {"accuracy": 0.5}}),
            DataError,
            "numbers of 1 parties, expected at least 2",
        ),
        (
            lambda run: with_parties(run, 2, metrics={"Ward 0": {"accuracy": 0.5}, "else": {"accuracy": 0.5}}),
            DataError,
            "numbers of 2 parties",
        ),
        (
            lambda run: with_parties(
                run, 2, metrics={"Ward 0": {"accuracy": 0.5}, "Ward 1": {"accuracy": float("nan")}}
            ),
            DataError,
            "accuracy is nan at a party",
        ),
        (
            lambda run: with_parties(run, 2, records={f"Ward {n}": 1 for n in range(PARTIES)}),
            DataError,
            "rest on fewer than 2 records",
        ),
    ],
)
def test_numbers_that_cannot_be_compared_are_refused(
    fair: Arms, change: Callable[[Run], Run], error: type[Exception], message: str
) -> None:
    fair["federated"][1] = change(fair["federated"][1])
    with pytest.raises(error, match=message):
        compare(fair)
