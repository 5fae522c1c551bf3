"""With noise: how far a record reaches, the law of what is opened, what the ledgers hold, the errors' coverage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from choral import BudgetExceededError, ClientPrivacy, ConfigError, Masked, Privacy, federated_statistics
from choral.privacy import Ledger
from choral.privacy.accounting.events import PoissonSampledShares
from choral.protocols import Plain
from choral.trainers import Categories, Count, Covariance, Histogram, Mean, Quantiles, Table
from choral.trainers.analytics.estimates import false_publication
from choral.trainers.analytics.federated_statistics import packing_of
from choral.trainers.analytics.releases import StatisticsRelease

pytestmark = pytest.mark.filterwarnings("ignore::choral.privacy.LedgerInMemoryWarning")

EVERY: dict[str, Any] = {
    "n": Count(column="x"),
    "x": Mean(-3, 5),
    "bins": Histogram([-3, 0, 1, 5], column="x"),
    "kind": Categories((0, 1)),
    "table": Table({"kind": (0, 1), "x": (0, 1)}),
    "both": Covariance({"x": (-3, 5), "y": (0, 10)}),
    "quartiles": Quantiles((0.25, 0.5, 0.75), -3, 5, bins=64, column="x"),
}
SUM = Masked(corrupt=1, min_survivors=3)
ANY = st.one_of(st.floats(), st.sampled_from([-3.0, 5.0, 1.0, 0.0, 10.0]))


def record(x: float, y: float, kind: float) -> dict[str, Any]:
    return {"x": np.array([x]), "y": np.array([y]), "kind": np.array([kind])}


@settings(max_examples=200, deadline=None)
@given(ANY, ANY, ANY)
def test_no_record_contributes_more_than_one(x: float, y: float, kind: float) -> None:
    packing = packing_of(EVERY, 10**6, noisy=True)
    assert np.linalg.norm(packing.sums(record(x, y, kind)) / packing.unit) <= 1.0


def test_the_bound_is_met() -> None:
    """A record at the ends, in a cell of everything: the sensitivity is not larger than it has to be."""
    packing = packing_of(EVERY, 10**6, noisy=True)
    assert np.linalg.norm(packing.sums(record(5.0, 10.0, 1.0)) / packing.unit) > 0.9999


@pytest.mark.parametrize("name", EVERY)
def test_each_statistic_has_its_share_of_the_sensitivity(name: str) -> None:
    packing = packing_of(EVERY, 10**6, noisy=True)
    share = packing.weights[name] / sum(packing.weights.values())
    one = (packing.sums(record(5.0, 10.0, 1.0)) / packing.unit)[packing.places[name]]
    assert float(one @ one) == pytest.approx(share, rel=1e-5)


def release_of(parties: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> StatisticsRelease:
    packing = packing_of(wanted, 1000, noisy=True)
    return StatisticsRelease(
        packing=packing,
        vectors={name: packing.sums(each) for name, each in parties.items()},
        records={name: len(each["x"]) for name, each in parties.items()},
        secure_sum=Plain(),
        digest=bytes(32),
    )


def opened(release: StatisticsRelease, privacy: Privacy) -> Any:
    return release.for_records(privacy, {name: Ledger() for name in release.names})


def test_two_neighbours_are_as_far_apart_as_the_ledger_says() -> None:
    """A distinguisher that knows everything but one record's presence, 600 times on either side.

    Its separation is 1/z by the ledger's noise multiplier z; the standard error of the measured one is .06, so that one
    of half the noise would be seen at 10 deviations and a false alarm at 4 comes once in 16,000.
    """
    privacy = Privacy(4.0, 1e-4, noise="distributed")
    wanted = {"x": Mean(-3, 5), "bins": Histogram([-3, 0, 5], column="x")}
    there = {"a": {"x": np.array([5.0, 1.0])}, "b": {"x": np.array([0.0, 2.0])}, "c": {"x": np.array([1.0])}}
    gone = there | {"a": {"x": np.array([np.nan, 1.0])}}  # the empty record
    ledgers = {name: Ledger() for name in there}
    first, second = release_of(there, wanted), release_of(gone, wanted)
    first.for_records(privacy, ledgers)
    (event,) = ledgers["a"].events
    assert isinstance(event, PoissonSampledShares)
    # The noise of the two shares that count; a plain sum of three has one more.
    more = math.sqrt(3.0 / event.honest)
    reach = (first.vectors["a"] - second.vectors["a"]) / first.packing.unit
    draws = 600
    sides = [(each, reach / each.packing.unit) for each in (first, second)]
    seen = np.array([[opened(each, privacy).total @ along for each, along in sides] for _ in range(draws)])
    separation = (seen[:, 0].mean() - seen[:, 1].mean()) / np.sqrt(seen.var(axis=0, ddof=1).mean())
    expected = np.linalg.norm(reach) / (event.share * math.sqrt(event.honest)) / more
    assert separation == pytest.approx(expected, abs=4 * math.sqrt(2 / draws))
    assert np.linalg.norm(reach) == pytest.approx(1.0, abs=1e-6)


def test_the_noise_is_of_the_size_that_is_stated() -> None:
    """600 draws of 5 + 3 coordinates: chi-square, a false alarm once in 10^6."""
    privacy = Privacy(1.0, 1e-4, noise="distributed")
    wanted = {"x": Mean(-3, 5), "bins": Histogram([-3, 0, 1, 5], column="x")}
    parties = {name: {"x": np.full(40, 1.0)} for name in "abcd"}
    release = release_of(parties, wanted)
    exact = sum(release.vectors.values())
    draws = [opened(release, privacy) for _ in range(600)]
    scaled = np.array([(each.total - exact) / each.noise for each in draws]).ravel()
    assert 1e-6 < stats.chi2.cdf(float(scaled @ scaled), scaled.size) < 1 - 1e-6
    assert stats.kstest(scaled, "norm").pvalue > 1e-6


def _tail_of_shares(threshold: float, most: float, share: float, step: float, parties: int) -> float:
    """P(most + the sum of `parties` Gaussians of deviation `share`, each rounded to steps, >= threshold): exact."""
    reach = math.ceil(9 * share / step)
    one = np.diff(stats.norm.cdf((np.arange(-reach, reach + 2) - 0.5) * step / share))
    law = np.array([1.0])
    for _ in range(parties):
        law = np.convolve(law, one)
    values = (np.arange(len(law)) - parties * reach) * step
    return float(law[values >= threshold - most - 1e-9].sum())


@pytest.mark.parametrize("deviations", [1.5, 3.0, 5.0])
def test_a_cell_of_one_contributor_is_shown_as_often_as_is_stated(deviations: float) -> None:
    """Against the law of rounded shares, convolved. A threshold that is off by a tenth of a deviation is found."""
    parties, share, step = 4, 3.0, 0.25
    deviation = math.sqrt(parties * (share**2 + step**2 / 12.0))
    threshold = round((1.0 + deviations * deviation) / step) * step
    exact = _tail_of_shares(threshold, 1.0, share, step, parties)
    assert false_publication(threshold - step / 2, 1.0, deviation) == pytest.approx(exact, rel=0.002)
    assert false_publication(threshold, 1.0, deviation) <= exact <= false_publication(threshold - step, 1.0, deviation)
    assert not 0.9 < false_publication(threshold + 0.1 * deviation, 1.0, deviation) / exact < 1.1


def test_single_contributors_are_shown_as_often_as_is_stated_in_real_releases() -> None:
    """8,000 cells of one record each, through noise in shares: within 5.5 standard errors, one false alarm in 10^7."""
    cells = 2000
    parties = {name: {"x": np.arange(at, cells, 4) + 0.5} for at, name in enumerate("abcd")}
    wanted = {"cells": Histogram(list(range(cells + 1)), column="x")}
    promise = Privacy(1.0, 1e-4, noise="distributed")
    bare = federated_statistics(parties, wanted, privacy=promise, secure_sum=SUM)
    deviation = bare["cells"]["count [0, 1)"].noise
    assert deviation is not None
    threshold, shown = 1.0 + 2.0 * deviation, 0
    for _ in range(4):
        found = federated_statistics(parties, wanted, privacy=promise, secure_sum=SUM, threshold=threshold)
        counts = [each.value for label, each in found["cells"].items() if label.startswith("count")]
        assert all(value is None or value >= threshold for value in counts)
        assert found.left_out == sum(value is None for value in counts)
        shown += sum(value is not None for value in counts)
    stated = found.false_publication["cells"]
    assert stated == pytest.approx(float(stats.norm.sf(2.0)), rel=1e-9)
    assert abs(shown - 4 * cells * stated) < 5.5 * math.sqrt(4 * cells * stated * (1 - stated))
    assert found.worst is not None
    assert bare.worst is not None
    assert found.worst.epsilon == bare.worst.epsilon  # nothing is paid for it


def test_a_threshold_is_said_in_result_table_json_and_page(tmp_path: Path) -> None:
    parties = {name: {"kind": np.array(["a"] * 400 + ["b"])} for name in "abc"}
    promise = Privacy(2.0, 1e-4, noise="distributed", records_per_person=3)
    wanted = {"kind": Categories(("a", "b")), "n": Count(column="kind")}
    found = federated_statistics(parties, wanted, privacy=promise, secure_sum=SUM, threshold=200.0)
    assert found["kind"]["count a"].value == pytest.approx(1200, abs=100)
    for label in ("count b", "share b", "count other"):
        assert found["kind"][label].value is None
    deviation = found["kind"]["count a"].noise
    assert deviation is not None
    assert found.false_publication == {"kind": pytest.approx(float(stats.norm.sf(197.0 / deviation)), abs=1e-12)}
    assert found["n"]["count"].value is not None  # of all records: no cell
    said = found.releases[-1]
    assert "Left out: 2 of 3 cells" in said
    assert said in found.table()
    assert said in found.save(tmp_path / "s.html").read_text()
    found.save(tmp_path / "s.json")
    assert type(found).load(tmp_path / "s.json") == found
    assert found.to_json()["threshold"] == 200.0
    assert found.to_json()["false_publication"] == found.false_publication


def test_one_client_counts_in_a_cell_what_its_clip_lets_through() -> None:
    """All of its norm in one cell: the clip times the cell's unit, which two statistics make larger."""
    privacy = ClientPrivacy(8.0, 1e-3, clip=10.0, noise="central")
    parties = {name: {"kind": np.array(["a"] * 50)} for name in "abcd"}
    wanted = {"kind": Categories(("a", "b")), "n": Count(column="kind", weight=3.0)}
    with pytest.raises(ConfigError, match="one contributor alone may count 20 in a cell"):
        federated_statistics(parties, wanted, privacy=privacy, threshold=19.0)
    found = federated_statistics(parties, wanted, privacy=privacy, threshold=60.0)
    deviation = found["n"]["count"].noise
    assert deviation is not None
    of_cell = deviation * math.sqrt(3.0)
    assert found.false_publication["kind"] == pytest.approx(float(stats.norm.sf(40.0 / of_cell)), rel=1e-6)


def test_ledgers_hold_the_release_and_compose_with_more(tmp_path: Path) -> None:
    parties = {name: {"x": np.arange(50.0) % 4} for name in "abc"}
    promise = Privacy(0.5, 1e-5, noise="distributed")
    found = federated_statistics(parties, {"x": Mean(-3, 5)}, privacy=promise, secure_sum=SUM, ledgers=tmp_path)
    ledgers = {name: Ledger(tmp_path / f"{name}.jsonl") for name in parties}
    for name, ledger in ledgers.items():
        (event,) = ledger.events
        assert isinstance(event, PoissonSampledShares)
        assert (event.sample_rate, event.honest, event.length) == (1.0, 2, 5)
        assert ledger.epsilon(1e-5) == found.spent[name].epsilon
        assert 0.49 < ledger.epsilon(1e-5) <= 0.5
    with pytest.raises(BudgetExceededError):  # once, and not again
        federated_statistics(parties, {"x": Mean(-3, 5)}, privacy=promise, secure_sum=SUM, ledgers=ledgers)
    assert all(len(ledger.events) == 1 for ledger in ledgers.values())


def test_for_a_person_with_several_records_the_claim_says_what_holds() -> None:
    parties = {name: {"x": np.arange(50.0) % 4} for name in "abc"}
    promise = Privacy(1.0, 1e-5, noise="distributed", records_per_person=3)
    found = federated_statistics(parties, {"x": Mean(-3, 5)}, privacy=promise, secure_sum=SUM)
    worst = found.worst
    assert worst is not None

    def delta(epsilon: float) -> float:
        """Of a Gaussian mechanism of three times the sensitivity (Balle and Wang 2018, theorem 8)."""
        mu = 3.0 / worst.noise_multiplier
        at = (mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu)
        return float(stats.norm.cdf(at[0]) - math.exp(epsilon) * stats.norm.cdf(at[1]))

    said = float(found.claim.partition("3 records of one person together: epsilon ")[2].split()[0])
    assert delta(said) < 1e-5 < delta(0.95 * said)  # half of delta is kept for the failures of the sum
    assert worst.records_per_person == 3


def test_client_level_noise_has_the_size_that_is_stated() -> None:
    """40 draws of 5 coordinates; a false alarm once in 10^4 on either side. Rounding is counted at its most."""
    for where in ("distributed", "central", "local"):
        privacy = ClientPrivacy(8.0, 1e-3, clip=40.0, noise=where)  # type: ignore[arg-type]
        parties = {name: {"x": np.full(40, 1.0)} for name in "abcd"}
        release = release_of(parties, {"x": Mean(-3, 5)})
        exact = sum(release.vectors.values())
        draws = [release.for_clients(privacy, Ledger()) for _ in range(40)]
        scaled = np.array([(each.total - exact) / each.noise for each in draws]).ravel()
        ratio = float(scaled @ scaled) / scaled.size
        low, high = stats.chi2.ppf([1e-4, 0.9999], scaled.size) / scaled.size
        assert 0.99 * low < ratio < high
        assert draws[0].survivors == tuple("abcd")


def test_a_client_beyond_the_clip_counts_for_the_clip() -> None:
    privacy = ClientPrivacy(1000.0, 1e-3, clip=10.0, noise="central")
    parties = {name: {"x": np.full(count, 1.0)} for name, count in {"a": 10, "b": 10, "c": 1000}.items()}
    found = federated_statistics(parties, {"x": Count()}, privacy=privacy)
    estimate = found["x"]["count"]
    assert estimate.value == pytest.approx(30.0, abs=5 * (estimate.noise or 0.0))
    assert estimate.noise is not None
    assert estimate.noise < 1.0


def population(generator: np.random.Generator, count: int) -> dict[str, Any]:
    """Two correlated columns, nearly normal, within the bounds."""
    first = np.clip(generator.normal(size=count), -2.5, 2.5)
    second = np.clip(0.6 * first + 0.8 * generator.normal(size=count), -3.5, 3.5)
    return {"x": 0.5 + first, "y": 5.0 + second, "kind": (first > -0.5).astype(float)}


def _covered(draws: int) -> dict[str, tuple[int, int]]:
    """How often each estimate's interval of 95 % has the population's value in it, over fresh data and noise."""
    generator = np.random.default_rng(20261129)
    privacy = Privacy(2.0, 1e-4, noise="distributed")
    whole = population(generator, 1_000_000)
    wanted = {name: EVERY[name] for name in ("n", "x", "bins", "kind", "both", "quartiles")} | {
        "table": Table({"kind": (0, 1), "side": (0, 1)})
    }
    whole["side"] = (whole["y"] > 5.0).astype(float)
    packing = packing_of(wanted, len(whole["x"]), noisy=False)
    truth = packing.read(packing.sums(whole), np.zeros(packing.length))
    hits: dict[str, tuple[int, int]] = {}
    for _ in range(draws):
        parties = {name: population(generator, 1500) for name in "abcd"}
        for table in parties.values():
            table["side"] = (table["y"] > 5.0).astype(float)
        release = release_of(parties, wanted)
        found = opened(release, privacy)
        exact = release.packing.read(sum(release.vectors.values()), np.zeros(release.packing.length))
        for name, estimates in release.packing.read(found.total, found.noise).items():
            for label, each in estimates.items():
                sampled = each.sampling is not None
                true = (truth if sampled else exact)[name][label].value
                interval = each.interval()
                if interval is None or true is None or "other" in label:
                    continue
                hit, seen = hits.get(f"{name}: {label}", (0, 0))
                hits[f"{name}: {label}"] = hit + (interval[0] <= true <= interval[1]), seen + 1
    return hits


OF_EACH_STATISTIC = (
    "n: count",
    *(f"x: {label}" for label in ("count", "sum", "mean", "variance", "deviation")),
    *(f"both: {label}" for label in ("count", "mean x", "mean y", "covariance x, x", "covariance x, y")),
    *(f"both: {label}" for label in ("covariance y, y", "correlation x, y")),
    *(f"bins: {word} {bin}" for word in ("count", "share") for bin in ("[-3, 0)", "[0, 1)", "[1, 5]")),
    *(f"kind: {word} {label}" for word in ("count", "share") for label in (0, 1)),
    *(f"table: {word} {a}, {b}" for word in ("count", "share") for a in (0, 1) for b in (0, 1)),
    "quartiles: count",
    *(f"quartiles: quantile {share}" for share in (0.25, 0.5, 0.75)),
)
"""Count, sum, mean, variance, covariance, correlation, histogram, label counts, contingency table, quantiles."""


@pytest.mark.slow
def test_standard_errors_cover_95_per_cent_in_a_thousand_draws() -> None:
    """Each within 2.5 points: 3.6 standard errors of a share of 1,000, a false alarm of all some 35 once in 100."""
    hits = _covered(1000)
    assert set(hits) == set(OF_EACH_STATISTIC)
    for name, (hit, seen) in hits.items():
        assert seen == 1000, name
        assert 0.925 <= hit / seen <= 0.975, (name, hit / seen)


def test_standard_errors_cover() -> None:
    """The same with 120 draws: within 8.3 points, four standard errors of a share of 120; a factor of 1.6 is found."""
    hits = _covered(120)
    assert set(hits) == set(OF_EACH_STATISTIC)
    for name, (hit, seen) in hits.items():
        assert seen >= 118, name
        assert hit / seen >= 0.867, (name, hit / seen)
