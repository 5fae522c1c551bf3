"""The probe of noise that is correlated over steps: honest trainers are passed, and each broken one is caught."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from probe_faults import FAULTS as RECORDS

from choral.audits import probe
from choral.errors import ConfigError
from choral.privacy import CorrelatedPrivacy
from choral.privacy.correlated import training_loop
from choral.privacy.correlated.training_loop import FixedOrderPlan

Break = Callable[[pytest.MonkeyPatch], None]
BUFFERED = CorrelatedPrivacy(epsilon=3.0, delta=1e-5, max_grad_norm=0.7, epochs=3)
BANDED = CorrelatedPrivacy(epsilon=3.0, delta=1e-5, mechanism="banded", epochs=3)


def plan_noise(change: Callable[[FixedOrderPlan, Any, int], Any]) -> Break:
    """change: of the plan, the honest noise of a step, and the number of the step."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest, number = FixedOrderPlan.noise, itertools.count()

        def noise(self: FixedOrderPlan, count: int, grid: float) -> Any:
            made = np.asarray(change(self, honest(self, count, grid), next(number)), dtype=np.float64)
            return np.rint(made / grid) * grid

        monkeypatch.setattr(FixedOrderPlan, "noise", noise)

    return broken


def uncorrelated(plan: FixedOrderPlan, z: Any, step: int) -> Any:
    """Fresh noise of the deviation that the correlated one has in that step: C makes another thing of it."""
    return np.random.default_rng().normal(size=len(z)) * z.std()


def seeded(plan: FixedOrderPlan, z: Any, step: int) -> Any:
    """White noise that anybody can make again, mixed as C^-1 mixes it."""
    white = np.stack([np.random.default_rng(t).normal(size=len(z)) for t in range(step + 1)])
    mixed: Any = plan.strategy.inverse(step + 1)[::-1] @ white  # type: ignore[union-attr]
    return mixed * plan.noise_multiplier * plan._clip


class Restarted:
    """The stream begins anew with every pass, and the ledger says that it goes on."""

    def __call__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = FixedOrderPlan.begin_pass

        def begin(self: FixedOrderPlan) -> Any:
            event = honest(self)
            self._stream = training_loop.stream(self.strategy)
            return event

        monkeypatch.setattr(FixedOrderPlan, "begin_pass", begin)


class Kept:
    before: Any = None

    def __call__(self, plan: FixedOrderPlan, z: Any, step: int) -> Any:
        self.before = z if step % 2 == 0 else self.before
        return self.before


def dealt_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other batches in every pass."""
    monkeypatch.setattr(
        training_loop.FixedSampler, "__iter__",
        lambda self: iter([list(part) for part in np.array_split(np.random.default_rng().permutation(
            list(itertools.chain(*self.batches))), len(self.batches))]),
    )  # fmt: skip


def twice_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = training_loop.deal

    def deal(*given: Any) -> list[list[int]]:
        batches = honest(*given)
        return [batches[0], batches[1] + batches[0][:40], *batches[2:]]

    monkeypatch.setattr(training_loop, "deal", deal)


FAULTS: dict[str, tuple[CorrelatedPrivacy, Break]] = {
    "3 percent less": (BUFFERED, plan_noise(lambda plan, z, t: 0.97 * z)),
    "over the batch size": (BUFFERED, plan_noise(lambda plan, z, t: z / plan.batch_size)),
    "none": (BANDED, plan_noise(lambda plan, z, t: 0.0 * z)),
    "none in one step": (BUFFERED, plan_noise(lambda plan, z, t: z * (t != 20))),
    "none from step 30 on": (BANDED, plan_noise(lambda plan, z, t: z * (t < 30))),
    "not correlated": (BUFFERED, plan_noise(uncorrelated)),
    "again in every other step": (BUFFERED, plan_noise(Kept())),
    "on half of the coordinates": (BANDED, plan_noise(lambda plan, z, t: z * (np.arange(len(z)) < len(z) // 2))),
    "uniform": (
        BANDED,
        plan_noise(lambda plan, z, t: np.random.default_rng().uniform(-1, 1, len(z)) * z.std() * math.sqrt(3.0)),
    ),
    "seeded by the step": (BUFFERED, plan_noise(seeded)),
    "begun anew in every pass": (BUFFERED, Restarted()),
    "clipped to 1.5": (BUFFERED, RECORDS["clipping", "to 1.5 C"]),
    "not clipped": (BANDED, RECORDS["clipping", "none"]),
    "other batches in every pass": (BUFFERED, dealt_anew),
    "drawn twice in a pass": (BANDED, twice_in_a_pass),
}  # fmt: skip
QUICK = ("not correlated", "begun anew in every pass", "drawn twice in a pass")


def caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promise, fault = FAULTS[name]
    fault(monkeypatch)
    found = probe(promise)
    assert any(check.violated for check in found.checks), found.sentence


@pytest.mark.parametrize("name", QUICK)
def test_a_subtle_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in QUICK])
def test_every_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(name, monkeypatch)


@pytest.mark.parametrize("promise", [BUFFERED, BANDED], ids=["buffered", "banded"])
def test_an_honest_trainer_is_passed(promise: CorrelatedPrivacy) -> None:
    """Nine checks at 1e-6 each. The matched filter tells canaries: by chance the area is above .6 once in 10^7."""
    found = probe(promise)
    assert not found.violated, found.sentence
    assert found.canaries.roc.auc.value > 0.6
    assert 2.9 < float(found.canaries.claimed or 0.0) <= 3.0


@pytest.mark.slow
def test_honest_trainers_are_passed_forty_times_of_forty() -> None:
    for number in range(40):
        found = probe((BUFFERED, BANDED)[number % 2])
        assert not found.violated, found.sentence


def test_the_tree_is_not_probed() -> None:
    with pytest.raises(ConfigError, match="tree"):
        probe(CorrelatedPrivacy(epsilon=3.0, delta=1e-5, mechanism="tree"))
