"""One plan is priced as fixed; a filter decides on what comes after it; and both numbers are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from choral.errors import ConfigError
from choral.privacy import (
    BudgetExceededError,
    ClientPrivacy,
    ClientPrivacyEngine,
    CorrelatedPrivacy,
    Ledger,
    LedgerError,
    Privacy,
    PrivacyEngine,
    private_search,
)
from choral.privacy.accounting import record_level, record_noise
from choral.privacy.accounting.client_level import epsilon as client_epsilon
from choral.privacy.accounting.events import ClientRelease, PlannedEvents, PoissonSampledGaussian, ReleasePlan, Search
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.privacy.ledgers.ledger_file import FILTER
from choral.privacy.ledgers.plans import guarantee

DELTA = 1e-3
EVENT = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=4.0, steps=10)


def train(promise: Privacy, problem: Any, loop: Callable[..., int], passes: int) -> Any:
    """In a fresh process, as far as the promise can tell."""
    model = problem.model()
    wrapped = promise.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    loop(*wrapped, epochs=passes)
    return wrapped[1]


def planned(path: Path | None = None, *, times: int = 10, epsilon: float = 3.0) -> Ledger:
    ledger = Ledger(path)
    ledger.bind("data", DELTA)
    ledger.append(EVENT, after=0, plan=ReleasePlan(epsilon=epsilon, parts=(PlannedEvents(event=EVENT, times=times),)))
    return ledger


@pytest.mark.parametrize("kind", [Privacy, CorrelatedPrivacy])
def test_stopping_early_leaves_the_guarantee_where_it_was(
    problem: Any, loop: Callable[..., int], kind: type[Privacy], tmp_path: Path
) -> None:
    promise = kind(epsilon=3.0, delta=DELTA, epochs=10, ledger=tmp_path / "a.jsonl")
    assert (promise.spent().epsilon, promise.spent().guarantee) == (0.0, 0.0)
    train(promise, problem, loop, 3)
    spent = promise.spent()
    assert spent.epsilon < 2.0 < 2.99 < spent.guarantee <= 3.0  # type: ignore[operator]
    assert "is guaranteed" in spent.in_words
    assert "fixed in advance" in spent.in_words
    assert spent.to_json()["guarantee"] == spent.guarantee
    assert guarantee(Ledger(tmp_path / "a.jsonl")) == spent.guarantee


@pytest.mark.parametrize("kind", [Privacy, CorrelatedPrivacy])
def test_stopping_early_makes_no_room(problem: Any, loop: Callable[..., int], kind: type[Privacy]) -> None:
    """What is left by privacy loss distributions after three of ten passes is not there for whoever looked."""
    promise = kind(epsilon=3.0, delta=DELTA, epochs=10, ledger=(ledger := Ledger()))
    optimizer = train(promise, problem, loop, 3)
    other = kind(epsilon=3.0, delta=DELTA, epochs=12, ledger=ledger)
    with pytest.raises(BudgetExceededError, match="12 passes are asked for, but 7 are left"):
        train(other, problem, loop, 1)
    smaller = type(problem)(batch_size=10)
    with pytest.raises(BudgetExceededError, match="the first plan alone") as caught:
        train(kind(epsilon=3.0, delta=DELTA, epochs=1, ledger=ledger), smaller, loop, 1)
    assert "7 more are left" in caught.value.hint
    assert len(ledger.events) == 3
    again = train(kind(epsilon=3.0, delta=DELTA, epochs=7, ledger=ledger), problem, loop, 7)
    assert again.noise_multiplier == optimizer.noise_multiplier
    assert len(ledger.segments) == 1
    assert ledger.epsilon(DELTA) <= 3.0
    with pytest.raises(BudgetExceededError, match="is spent"):
        train(kind(epsilon=3.0, delta=DELTA, epochs=1, ledger=ledger), problem, loop, 1)


def test_a_second_plan_is_what_the_filter_leaves(problem: Any, loop: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    train(Privacy(epsilon=1.0, delta=DELTA, epochs=4, ledger=path), problem, loop, 4)
    first = Ledger(path).events
    second = Privacy(epsilon=3.0, delta=DELTA, epochs=4, ledger=path)
    noise = train(second, problem, loop, 4).noise_multiplier
    rest = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=noise, steps=40)
    assert 2.99 < PrivacyFilter(3.0, DELTA).cost([*first, rest]) <= 3.0
    fixed = record_noise.noise_multiplier(3.0, DELTA, 0.1, 40, first, slack=1e-3, fixed=True)
    assert 1.02 * fixed < noise < 1.3 * fixed  # what choosing late costs
    spent = second.spent()
    assert (spent.guarantee, len(Ledger(path).segments)) == (3.0, 2)
    assert spent.epsilon < 2.95
    with pytest.raises(BudgetExceededError, match="all of it comes to"):
        train(Privacy(epsilon=3.0, delta=DELTA, ledger=path), problem, loop, 1)


def test_a_new_plan_ends_the_old_one(problem: Any, loop: Callable[..., int]) -> None:
    """Its passes were given up for what the filter left."""
    ledger = Ledger()
    old = PrivacyEngine(Privacy(epsilon=1.0, delta=DELTA, epochs=4), holder="data", ledger=ledger, passes=4)
    model = problem.model()
    wrapped = old.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    loop(*wrapped)
    train(Privacy(epsilon=3.0, delta=DELTA, epochs=2, ledger=ledger), problem, loop, 1)
    with pytest.raises(LedgerError, match="somebody else"):
        loop(*wrapped)
    assert len(ledger.events) == 2
    # The second stopped early, too; a filter counts what was released.
    noisy = train(Privacy(epsilon=3.0, delta=DELTA, epochs=3, ledger=ledger), problem, loop, 3)
    assert noisy.noise_multiplier > 0.0
    assert guarantee(ledger) == 3.0


def test_what_was_fixed_together_is_one_plan(problem: Any, loop: Callable[..., int]) -> None:
    """A private mean and the training after it, whose noise was calibrated before either."""
    mean = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=10.0, steps=1)
    noise = record_noise.noise_multiplier(3.0, DELTA, 0.1, 20, [mean], slack=1e-3, fixed=True)
    one_pass = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=noise, steps=10)
    ledger = Ledger()
    ledger.bind("data", DELTA)
    parts = (PlannedEvents(event=mean, times=1), PlannedEvents(event=one_pass, times=2))
    ledger.append(mean, after=0, plan=ReleasePlan(epsilon=3.0, parts=parts))
    promise = Privacy(epsilon=3.0, delta=DELTA, epochs=2, ledger=ledger)
    assert train(promise, problem, loop, 2).noise_multiplier == noise
    spent = promise.spent()
    assert 2.99 < spent.epsilon <= 3.0
    assert spent.guarantee == spent.epsilon


@pytest.mark.parametrize("what", ["an event too many", "another event", "a second part", "no plan"])
def test_nothing_is_guaranteed_of_what_was_not_planned(what: str) -> None:
    ledger = planned(times=1)
    assert guarantee(ledger) == record_level.epsilon([EVENT], DELTA)
    if what == "no plan":
        ledger = Ledger()
        ledger.bind("data", DELTA)
        ledger.append(EVENT, after=0)
    else:
        noise = 4.0 if what == "an event too many" else 5.0
        other = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=noise, steps=10)
        ledger.append(other, after=1)
    assert guarantee(ledger) is None
    spent = Privacy(epsilon=3.0, delta=DELTA, ledger=ledger).spent()
    assert spent.guarantee is None
    assert spent.epsilon > 0.0
    assert "releases that were fixed in advance" in spent.in_words


def test_a_plan_on_a_ledger_that_the_filter_does_not_admit_is_no_guarantee() -> None:
    """As somebody would write who calibrated by privacy loss distributions on top of what was there."""
    ledger = planned(times=10)
    fixed = record_noise.noise_multiplier(3.0, DELTA, 0.1, 100, [EVENT] * 10, fixed=True)
    second = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=fixed, steps=100)
    assert record_level.epsilon([EVENT] * 10 + [second], DELTA) <= 3.0
    ledger.append(second, after=1, plan=ReleasePlan(epsilon=3.0, parts=(PlannedEvents(event=second, times=1),)))
    assert guarantee(ledger) is None


def test_a_plan_beyond_its_promise_is_not_gone_on_with(problem: Any, loop: Callable[..., int]) -> None:
    dear = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=0.8, steps=10)
    ledger = Ledger()
    ledger.bind("data", DELTA)
    ledger.append(dear, after=0, plan=ReleasePlan(epsilon=3.0, parts=(PlannedEvents(event=dear, times=50),)))
    with pytest.raises(BudgetExceededError, match="is spent"):
        train(Privacy(epsilon=3.0, delta=DELTA, epochs=2, ledger=ledger), problem, loop, 1)


def test_plans_are_lines_of_the_file_and_part_of_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ledger = planned(path)
    assert Ledger(path).segments == (
        (ReleasePlan(epsilon=3.0, parts=(PlannedEvents(event=EVENT, times=10),)), (EVENT,)),
    )
    assert ledger.head == Ledger(path).head == ledger.head_after(1)
    again = Ledger(path)
    again.bind("data", DELTA)
    again.append(EVENT, after=1)
    assert ledger.events == (EVENT, EVENT)
    text = path.read_text()
    path.write_text(text.replace('"times":10', '"times":99'))
    with pytest.raises(LedgerError, match="chain of hashes"):
        Ledger(path)
    path.write_text("".join(text.splitlines(keepends=True)[:2]))  # the plan alone releases nothing
    with pytest.raises(LedgerError, match="holds no event"):
        Ledger(path)


def test_a_ledger_without_plans_is_read_and_the_filter_decides_on_the_rest(
    problem: Any, loop: Callable[..., int], tmp_path: Path
) -> None:
    """As older versions wrote it."""
    path = tmp_path / "a.jsonl"
    ledger = Ledger(path)
    ledger.bind("data", DELTA)
    for known in range(3):
        ledger.append(EVENT, after=known)
    promise = Privacy(epsilon=3.0, delta=DELTA, epochs=2, ledger=path)
    assert (promise.spent().steps, promise.spent().guarantee) == (30, None)
    train(promise, problem, loop, 2)
    assert 2.99 < PrivacyFilter(3.0, DELTA).cost(Ledger(path).events) <= 3.0
    assert promise.spent().guarantee == 3.0


def test_a_search_is_a_plan_of_one_and_can_come_second() -> None:
    ledger = planned(times=1)
    promise = Privacy(epsilon=4.0, delta=DELTA, ledger=ledger)
    found = private_search(promise, [0.1], lambda rate, _: (rate, rate), records=200, batch_size=20, mean=5)
    assert found is not None
    assert isinstance(ledger.events[1], Search)
    assert 3.98 < PrivacyFilter(4.0, DELTA).cost(ledger.events) <= 4.0
    assert found.spent.guarantee == 4.0
    alone = Privacy(epsilon=4.0, delta=DELTA)
    private_search(alone, [0.1], lambda rate, _: (rate, rate), records=200, batch_size=20, mean=5)
    assert alone.spent().guarantee == alone.spent().epsilon > 3.9


def test_more_survivors_are_printed_and_not_subtracted() -> None:
    """The server picks who is there after it saw the sums before: the promise is for the fewest that may be."""
    import numpy as np

    ledger = Ledger()
    promise = ClientPrivacy(epsilon=6.0, delta=1e-5, min_survivors=12, ledger=ledger)

    def engine(rounds: int) -> ClientPrivacyEngine:
        return ClientPrivacyEngine(promise, clients=20, length=5, rounds=rounds, ledger=ledger)

    first = engine(4)
    for _ in range(3):
        current = first.begin()
        current.decode(sum(current.encode(np.ones(5)) for _ in range(20)), 20)
    spent = first.spent()
    worst = first.scheme.release(first.holders)
    assert spent.guarantee == client_epsilon([worst] * 4, 1e-5) > 5.9
    assert spent.epsilon < 4.0
    with pytest.raises(BudgetExceededError, match="is spent"):
        engine(2)
    assert engine(1).ratio == first.ratio  # the round that is left of the plan


def test_a_second_plan_for_clients_counts_who_was_there() -> None:
    """The filter covers it: how many shares a sum has is settled before anything of that sum is seen."""
    import numpy as np

    ledger = Ledger()

    def engine(epsilon: float) -> ClientPrivacyEngine:
        promise = ClientPrivacy(epsilon=epsilon, delta=1e-5, min_survivors=12)
        return ClientPrivacyEngine(promise, clients=20, length=5, rounds=2, ledger=ledger)

    first = engine(2.0)
    for _ in range(2):
        current = first.begin()
        current.decode(sum(current.encode(np.ones(5)) for _ in range(20)), 20)
    second = engine(6.0)
    worst = second.scheme.release(second.holders)
    for _ in range(2):
        second.begin()
    assert 5.98 < PrivacyFilter(6.0, 1e-5).cost((*ledger.releases[:4], worst, worst)) <= 6.0
    assert second.spent().guarantee == 6.0


@pytest.mark.parametrize(
    "bad",
    [
        lambda: PlannedEvents(event=EVENT, times=0),
        lambda: PlannedEvents(event=EVENT, times=True),
        lambda: PlannedEvents(event="x", times=1),  # type: ignore[arg-type]
        lambda: PlannedEvents(event=Search(tries=(EVENT,), mean=2), times=2),
        lambda: ReleasePlan(epsilon=3.0, parts=()),
        lambda: ReleasePlan(epsilon=0.0, parts=(PlannedEvents(event=EVENT, times=1),)),
        lambda: ReleasePlan(epsilon=3.0, parts=(EVENT,)),  # type: ignore[arg-type]
        lambda: ReleasePlan(
            epsilon=3.0,
            parts=(
                PlannedEvents(event=EVENT, times=1),
                PlannedEvents(
                    event=ClientRelease(
                        mechanism="gaussian", sensitivity_squared=1, share_variance=1.0, shares=1, length=1
                    ),
                    times=1,
                ),
            ),
        ),
    ],
)
def test_a_plan_of_nothing_or_of_two_units_is_refused(bad: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        bad()


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The header changed, all hashes fresh."""
    entries = [json.loads(line)["entry"] for line in path.read_bytes().splitlines()]
    change(entries[0])
    path.write_bytes(lines(GENESIS, entries)[0])


def test_the_header_names_the_filter_and_orders_that_the_first_promise_fixed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    planned(path)
    rule = PrivacyFilter(3.0, DELTA)
    header = json.loads(path.read_bytes().splitlines()[0])["entry"]
    assert (header["filter"], header["orders"]) == (FILTER, list(rule.orders))
    more = ReleasePlan(epsilon=9.0, parts=(PlannedEvents(event=EVENT, times=1),))
    ledger = Ledger(path)
    ledger.bind("data", DELTA)
    ledger.append(EVENT, after=1, plan=more)  # under a larger promise, whose orders are its own
    assert Ledger(path).written() == path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [lambda h: h["orders"].append(4000), lambda h: h.update(filter="renyi mixture 2"), lambda h: h.pop("orders")],
)
def test_a_ledger_begun_under_another_filter_is_refused(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    """What was decided by other orders would be decided otherwise now: a filter's orders are fixed for ever."""
    path = tmp_path / "data.jsonl"
    planned(path)
    rewritten(path, change)
    with pytest.raises(LedgerError, match="begun under another filter than this Choral decides by"):
        Ledger(path)


def test_a_ledger_of_before_headers_named_a_filter_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    planned(path)
    rewritten(path, lambda header: (header.pop("filter"), header.pop("orders")))
    ledger = Ledger(path)
    ledger.bind("data", DELTA)
    ledger.append(EVENT, after=1)
    assert len(Ledger(path).events) == 2
    assert b"filter" not in path.read_bytes().splitlines()[0]
