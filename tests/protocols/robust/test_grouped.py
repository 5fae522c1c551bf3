"""Sums in random groups through the real masked sums: the rule's mean, what is refused, what a spoiled group does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from choral.privacy import FixedPoint
from choral.protocols import Grouped, Masked, Plain, SpecError, StateUsedError, SumSpec, TooFewSurvivorsError
from choral.protocols.robust import grouped
from choral.protocols.robust.rules import robust_mean

NAMES = tuple(f"p{at:02}" for at in range(17))
CODE = FixedPoint(bound=8.0, value_bits=24, max_weight=16)
SPEC = SumSpec(
    parties=NAMES, length=5, bound=CODE.integer_bound, encoding=repr(CODE), weight_bound=CODE.max_weight
)  # fmt: skip
SUMS = Grouped(sums=Masked(corrupt=1), group=5)


def updates(seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=4) for name in NAMES}


def joined(sums: Grouped, vectors: Mapping[str, np.ndarray], lost: Any = None) -> tuple[np.ndarray, Any, list[Any]]:
    """The decoded mean, the result, and the groups that were dealt."""
    session = sums.open(SPEC)
    seen: list[Any] = []
    original = grouped.dealt

    def watched(parties: Any, group: int) -> Any:
        seen.append(original(parties, group))
        return seen[-1]

    grouped.dealt = watched
    try:
        summing = session.begin(lost)
    finally:
        grouped.dealt = original
    for name, vector in vectors.items():
        summing.submit(name, vector)
    result = summing.finish()
    mean, _ = CODE.decode(result.total, len(result.survivors))
    return mean.numpy(), result, seen[0]


@pytest.mark.parametrize("rule", ["median", "trimmed", "geometric"])
def test_the_rule_of_the_groups_weighted_means(rule: str) -> None:
    plain, weights = updates(), {name: 1 + at % 7 for at, name in enumerate(NAMES)}
    mean, result, groups = joined(
        replace(SUMS, robust=rule), {name: CODE.encode(plain[name], weights[name]) for name in NAMES}
    )
    assert sorted(len(group) for group in groups) == [5, 6, 6]
    assert sorted(sum(groups, ())) == sorted(NAMES)
    rows = [np.average([plain[n] for n in group], axis=0, weights=[weights[n] for n in group]) for group in groups]
    assert np.abs(mean - robust_mean(np.array(rows), rule)).max() < 2 * CODE.step  # type: ignore[arg-type]
    assert result.survivors == NAMES
    assert all(count > 0 for count in result.bytes_up.values())


def test_groups_are_dealt_anew_and_evenly() -> None:
    """Of 400 deals of 15 into 3, a pair is together in 4/14 of them; a false alarm at 5 deviations."""
    together = 0
    for _ in range(400):
        groups = grouped.dealt(NAMES[:15], 5)
        assert [len(group) for group in groups] == [5, 5, 5]
        together += any({"p00", "p01"} <= set(group) for group in groups)
    assert together / 400 == pytest.approx(4 / 14, abs=5 * (4 / 14 * 10 / 14 / 400) ** 0.5)


def test_one_party_with_a_huge_weight_or_vector_rules_nothing() -> None:
    vectors = {name: CODE.encode(update, 1) for name, update in updates().items()}
    four = replace(SUMS, group=4)
    honest, _, _ = joined(four, vectors)
    spoilt = CODE.encode(np.full(4, 8.0), 1)
    for weight in (16, -16, 1):  # within what the sum lets through; it makes the vector of its own
        evil = np.append(spoilt[:-1] * 16, weight)
        mean, _, _ = joined(four, vectors | {"p03": evil})
        assert np.abs(mean).max() < 1.6  # where the plain mean of equal weights is moved by 16 * 8 / 17
    assert np.abs(honest).max() < 1.6


def test_a_group_of_impossible_weight_is_left_out() -> None:
    result = replace(joined(SUMS, {n: CODE.encode(u, 1) for n, u in updates().items()})[1], survivors=NAMES[:5])
    for total in ([0, 0, 0, 0, 4], [0, 0, 0, 0, 81], [0, 0, 0, 0, -5], [5 * 2**23, 0, 0, 0, 5]):
        assert grouped.group_mean(replace(result, total=np.array(total)), SPEC) is None
    assert grouped.group_mean(replace(result, total=np.array([5, 10, 0, -5, 5])), SPEC) is not None


def test_dropouts_cost_their_group_at_most() -> None:
    vectors = {name: CODE.encode(update, 1) for name, update in updates().items()}
    _, result, _ = joined(SUMS, {name: v for name, v in vectors.items() if name != "p04"})
    assert set(result.survivors) == set(NAMES) - {"p04"}
    with pytest.raises(TooFewSurvivorsError, match="groups have a mean"):
        joined(SUMS, {name: vectors[name] for name in NAMES[:4]})
    session = SUMS.open(SPEC)
    first = session.begin()
    session.begin()
    with pytest.raises(StateUsedError):
        first.submit("p00", vectors["p00"])


def test_the_statement_has_the_smaller_anonymity_set_and_the_breakdown_point() -> None:
    statement = replace(SUMS, attackers=0.12).open(SPEC).statement
    assert statement["anonymity_set"] == 5
    assert statement["groups"] == 3
    assert statement["groups_withstood"] == 1
    assert statement["attackers"] == 2
    # Two attackers are in one group with probability (C(5,2) + 2 C(6,2)) / C(17,2) = 40 / 136.
    assert statement["probability_beyond"] == pytest.approx(1 - 40 / 136)
    assert "hidden among the 5 of its group, not among 17" in statement["trust"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grouped(sums=Plain()), "sees every vector anyway"),
        (lambda: Grouped(sums=SUMS), "expected a secure sum"),
        (lambda: Grouped(sums=Masked), "expected a secure sum"),  # type: ignore[arg-type]
        (lambda: Grouped(sums=Masked(contributors=3)), "counted in each group"),
        (lambda: Grouped(sums=Masked(), robust="krum"), "robust"),  # type: ignore[arg-type]
        (lambda: Grouped(sums=Masked(), group=2), "group"),
        (lambda: Grouped(sums=Masked(), attackers=0.5), "share between"),
        (lambda: Grouped(sums=Masked(), attackers=3), "share between"),
        (lambda: replace(SUMS, group=6).open(SPEC), "make 2 groups of 6"),
        (lambda: SUMS.open(replace(SPEC, weight_bound=None)), "without a weight"),
        (lambda: SUMS.open(replace(SPEC, bits=12)), "without a weight, or with noise"),
        (lambda: Grouped(sums=Masked(corrupt=4)).open(SPEC), "corrupt"),
        (lambda: SUMS.party_driver(SPEC), "processes of their own"),
        (lambda: SUMS.server_driver(SPEC), "processes of their own"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make()
