"""Where the verdict on a budget turns: each limit from both sides, and what is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from choral.audits.budgets import budgets
from choral.audits.budgets.budgets import MISSTATED, MISSTATED_LEAST, SETTLED, TOLERANCE, Recomputed
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.ledgers.spent import Spent

LATEST = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=0.9, steps=20)
CLAIMED = Spent(epsilon=3.0, delta=1e-5, accountant="PLD", steps=20, noise_multiplier=0.9, sample_rate=0.1)
PROMISED, DELTA = 4.0, 1e-5


def never(limit: float) -> tuple[float, float]:
    raise AssertionError(limit)


def costs(upper: float, lower: float | None = None, finer: float | None = None) -> Recomputed:
    """A ledger whose cost is at most `upper` by one grid, and between `lower` and `finer` by others, if asked."""
    if lower is None:
        return Recomputed(upper, never, LATEST)
    return Recomputed(upper, lambda _: (lower, upper if finer is None else finer), LATEST)


@pytest.mark.parametrize(
    ("recomputed", "verdict"),
    [
        (costs(4.0), "holds"),
        (costs(4.0 * (1 + 0.9 * TOLERANCE)), "holds"),
        (costs(4.1, lower=3.9, finer=4.0), "holds"),
        (costs(4.1, lower=4.0, finer=4.0 + 0.9 * MISSTATED * 4.0), "holds"),  # too narrow to tell
        (costs(4.2, lower=4.0, finer=4.0 + 1.1 * MISSTATED * 4.0), "unverified"),
        (costs(5.0, lower=4.001), "violated"),
        (costs(5.0, lower=math.nan), "violated"),
        (costs(math.inf, lower=0.0), "unverified"),
        (costs(math.nan, lower=4.001), "violated"),
        (costs(math.nan, lower=3.0), "unverified"),
    ],
)
def test_a_cost_is_within_a_limit_above_it_or_cannot_be_told(recomputed: Recomputed, verdict: str) -> None:
    assert budgets._within(recomputed, 4.0) == verdict


def test_a_small_cost_may_be_off_by_an_absolute_amount() -> None:
    assert budgets._within(costs(0.13, lower=0.1, finer=0.1 + 0.9 * MISSTATED_LEAST), 0.1) == "holds"
    assert budgets._within(costs(0.14, lower=0.1, finer=0.1 + 1.1 * MISSTATED_LEAST), 0.1) == "unverified"


def judged(
    claimed: Spent | None = CLAIMED, steps: int = 20, recomputed: Any = None, *, finished: bool = True
) -> tuple[str, str]:
    found = costs(3.0) if recomputed is None else recomputed
    return budgets._judge(PROMISED, DELTA, claimed, steps, found, finished=finished)


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({}, "holds", "recomputed"),
        ({"delta": DELTA * (1 + 0.9 * TOLERANCE)}, "holds", "recomputed"),
        ({"delta": DELTA * (1 + 1.1 * TOLERANCE)}, "violated", "is stated at"),
        ({"epsilon": math.nan}, "violated", "claims more than was promised"),
        ({"epsilon": PROMISED * (1 + 1.1 * TOLERANCE)}, "violated", "claims more than was promised"),
        ({"steps": 19}, "violated", "the ledger holds 20 steps, run.json states 19"),
        ({"steps": 21}, "unverified", "part of it is missing"),
        ({"noise_multiplier": 0.9 * (1 + 1e-8)}, "violated", "noise multiplier"),
        ({"noise_multiplier": 0.9 * (1 + 1e-10)}, "holds", "recomputed"),
        ({"sample_rate": 0.1 * (1 - 1e-8)}, "violated", "sample rate"),
        ({"epsilon": 3.0 * (1 + 0.9 * MISSTATED)}, "holds", "recomputed"),
        ({"epsilon": 3.0 * (1 + 1.1 * MISSTATED)}, "violated", "one of them was edited"),
    ],
)
def test_what_is_claimed_is_held_against_promise_and_ledger(change: dict[str, Any], verdict: str, said: str) -> None:
    found = judged(replace(CLAIMED, **change))
    assert (found[0], said in found[1]) == (verdict, True), found


def test_a_ledger_above_promise_or_claim() -> None:
    assert judged(recomputed=costs(5.0, lower=4.5)) == ("violated", "the ledger costs more than was promised")
    assert judged(recomputed=costs(9.0, lower=1.0))[0] == "unverified"
    assert judged(recomputed=costs(3.5, lower=3.4)) == ("violated", "the ledger costs more than run.json claims")
    assert judged(recomputed=costs(3.5, lower=2.5))[0] == "unverified"
    unfinished = judged(recomputed=costs(3.5, lower=3.4), finished=False)
    assert unfinished == ("holds", "the ledger also holds a round that was cut short; the ledger counts")
    assert judged(recomputed=costs(5.0, lower=4.5), finished=False)[0] == "violated"
    assert judged(replace(CLAIMED, steps=10), finished=False)[0] == "holds"
    assert judged(replace(CLAIMED, steps=21), finished=False)[0] == "unverified"


def test_without_a_claim_or_a_price_nothing_holds() -> None:
    assert judged(None)[0] == "violated"
    assert judged(None, steps=0)[0] == "unverified"
    assert judged(None, finished=False)[0] == "unverified"
    assert judged(recomputed="no bound")[0] == "unverified"
    assert budgets._judge(PROMISED, DELTA, CLAIMED, 0, None, finished=True)[0] == "unverified"


@pytest.mark.parametrize(
    ("guarantee", "claimed", "planned", "verdict"),
    [
        (3.0, 3.0, True, "holds"),
        (3.0, None, True, "holds"),
        (None, None, False, "holds"),  # and says that there is none
        (None, None, True, "violated"),
        (PROMISED * (1 + 0.9 * TOLERANCE), PROMISED, True, "holds"),
        (PROMISED * (1 + 1.1 * TOLERANCE), None, True, "violated"),
        (math.nan, None, True, "violated"),
        (3.0, 2.9, True, "violated"),
        (None, 3.0, False, "violated"),
    ],
)
def test_a_guarantee_is_that_of_the_plans(
    guarantee: float | None, claimed: float | None, planned: bool, verdict: str
) -> None:
    spent = replace(CLAIMED, guarantee=claimed)
    found, said = budgets._judge_plans(PROMISED, spent, guarantee, planned, "so far")
    assert found == verdict
    assert ("no plan was recorded" in said) == (guarantee is None and verdict == "holds")


@pytest.mark.parametrize(
    ("arm", "changes", "verdict"),
    [
        ("federated-dp", {"parties": {"a": 99, "b": 50}}, "holds"),
        ("federated-dp", {"parties": {"a": 100, "b": 50}}, "violated"),
        ("federated-dp", {"parties": {}}, "violated"),
        ("cloud-dp", {"parties": {"a": 60, "b": 39}}, "holds"),
        ("cloud-dp", {"parties": {"a": 60, "b": 40}}, "violated"),
    ],
)
def test_delta_is_below_one_over_the_records_of_whoever_has_most(
    make_run: Callable[..., Any], arm: str, changes: dict[str, Any], verdict: str
) -> None:
    run = make_run(arm, privacy={"epsilon": 8.0, "delta": 0.01}, **changes)
    assert budgets._delta_means_something(run).verdict == verdict


@pytest.mark.parametrize(("delta", "verdict"), [(0.1, "violated"), (0.0999, "holds")])
def test_delta_of_clients_is_below_one_over_their_number(
    make_client_run: Callable[..., Any], delta: float, verdict: str
) -> None:
    run = make_client_run()
    run = replace(run, info=_changed(run.info, privacy={**run.info.privacy, "delta": delta}))
    assert run.info.party_count == 10
    assert budgets._delta_means_something(run).verdict == verdict


def _changed(info: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(info, **changes)


def test_the_history_may_pass_the_claim_by_what_two_grids_differ(make_run: Callable[..., Any]) -> None:
    run = make_run("federated-dp", epsilon=4.0)
    claimed = run.spent.epsilon
    for factor, verdict in ((1 + 0.9 * SETTLED, "holds"), (1 + 1.1 * SETTLED, "violated")):
        history = list(run.history)
        history[5] = _changed(history[5], epsilon=claimed * factor)
        assert budgets._history_agrees(replace(run, history=tuple(history))).verdict == verdict
