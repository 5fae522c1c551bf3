"""A copy of a promise is the same promise: what was spent under one is spent under all of them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from choral.errors import ConfigError
from choral.privacy import (
    BudgetExceededError,
    ClientPrivacy,
    CorrelatedPrivacy,
    Ledger,
    LedgerError,
    Privacy,
    private_search,
)
from choral.privacy.accounting.events import ClientRelease, PoissonSampledGaussian

EVENT = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.5, steps=10)
COPIES = {
    "replace": lambda promise: dataclasses.replace(promise, max_grad_norm=0.5),
    "replace nothing": dataclasses.replace,
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "deep copy of a list": lambda promise: copy.deepcopy([promise])[0],
    "replace of a copy": lambda promise: dataclasses.replace(copy.deepcopy(promise), epsilon=2.0),
}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
kinds = pytest.mark.parametrize("kind", [Privacy, CorrelatedPrivacy])


def spend(promise: Privacy) -> None:
    ledger = promise._open()
    ledger.bind("data", promise.delta)
    ledger.append(EVENT, after=len(ledger.events))


@kinds
@copies
@pytest.mark.parametrize("kept", ["memory", "file"])
def test_what_one_copy_spends_all_have_spent(
    kind: type[Privacy], copied: Callable[[Any], Any], kept: str, tmp_path: Path
) -> None:
    promise = kind(epsilon=3.0, delta=1e-3, ledger=tmp_path / "a.jsonl" if kept == "file" else None)
    early = copied(promise)  # before anything is spent
    spend(promise)
    late = copied(promise)
    assert promise.spent().steps == early.spent().steps == late.spent().steps == 10
    spend(late)
    assert promise.spent() == early.spent() == late.spent()
    assert promise.spent().steps == 20


@kinds
def test_a_trained_promise_cannot_be_trained_again_under_another_norm(problem: Any, loop: Any, kind: Any) -> None:
    import torch

    promise = kind(epsilon=3.0, delta=1e-3)
    model = problem.model()
    loop(*promise.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()))
    assert promise.spent().epsilon > 2.99
    again = dataclasses.replace(promise, max_grad_norm=0.5)
    assert again.spent() == promise.spent()
    model = problem.model()
    with pytest.raises(BudgetExceededError):
        again.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())


@kinds
def test_a_promise_in_memory_is_not_pickled_and_one_in_a_file_goes_on_there(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be pickled"):
        pickle.dumps(kind(epsilon=3.0, delta=1e-3))
    promise = kind(epsilon=3.0, delta=1e-3, ledger=tmp_path / "a.jsonl")
    early = pickle.loads(pickle.dumps(promise))  # noqa: S301
    spend(promise)
    late = pickle.loads(pickle.dumps(promise))  # noqa: S301
    assert early.spent().steps == late.spent().steps == 10
    spend(early)
    assert promise.spent().steps == 20


def test_a_given_ledger_is_the_promises_own() -> None:
    """Two promises on one ledger, in memory or not, know of each other."""
    ledger = Ledger()
    one, two = (Privacy(epsilon=3.0, delta=1e-3, max_grad_norm=norm, ledger=ledger) for norm in (1.0, 2.0))
    spend(one)
    assert two.spent().steps == 10
    assert len(ledger.events) == 1
    for bad in (3, b"a.jsonl", ["a.jsonl"]):
        with pytest.raises(ConfigError, match="ledger"):
            Privacy(epsilon=3.0, delta=1e-3, ledger=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="ledger"):
            ClientPrivacy(epsilon=3.0, delta=1e-3, ledger=bad)  # type: ignore[arg-type]


def test_a_file_that_vanishes_between_two_trainings_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    promise = Privacy(epsilon=3.0, delta=1e-3, ledger=path)
    spend(promise)
    path.unlink()
    for copied in (promise, dataclasses.replace(promise, max_grad_norm=2.0), copy.deepcopy(promise)):
        with pytest.raises(LedgerError, match="is gone"):
            copied.spent()


@copies
def test_a_promise_for_clients_shares_the_ledger_it_was_given(copied: Callable[[Any], Any]) -> None:
    if copied is COPIES["replace"]:
        copied = COPIES["replace nothing"]  # its norm is called clip
    promise = ClientPrivacy(epsilon=3.0, delta=1e-3, ledger=Ledger())
    other = copied(promise)
    assert isinstance(other.ledger, Ledger)
    other.ledger.bind("clients", 1e-3, unit="client")
    release = ClientRelease(mechanism="gaussian", sensitivity_squared=1, share_variance=4.0, shares=1, length=3)
    other.ledger.append(release, after=0)
    assert isinstance(promise.ledger, Ledger)
    assert promise.ledger.releases == (release,)


@copies
def test_a_copy_of_a_trys_promise_trains_no_second_time(problem: Any, loop: Any, copied: Callable[[Any], Any]) -> None:
    import torch

    def train(_: float, promise: Privacy) -> tuple[None, float]:
        for number in range(2):
            model = problem.model()
            wrapped = copied(promise).wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
            assert number == 0
            loop(*wrapped)
        return None, 1.0

    promise = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(BudgetExceededError, match="trained already"):
        private_search(promise, [0.1], train, records=200, batch_size=20, mean=3)
