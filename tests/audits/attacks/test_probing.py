"""Broken trainers, the real wrapper with one line made wrong, are caught with the defaults; the honest one is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES

from choral.audits.attacks.probing import FALSE_ALARMS, noise_reuse, probe
from choral.privacy import AdaptiveClip, PerLayerClip, Privacy
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.dpsgd import execution_plan
from choral.privacy.dpsgd import private_optimizer as step
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer

PROMISE = Privacy(epsilon=2.0, delta=1e-5, max_grad_norm=0.7, epochs=3)


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PrivateOptimizer._clip_factors

    def ones(self: PrivateOptimizer, samples: list[Any]) -> Any:
        factors, *rest = honest(self, samples)
        return [torch.ones_like(factor) for factor in factors], *rest

    monkeypatch.setattr(PrivateOptimizer, "_clip_factors", ones)


def noise_over_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is divided by the batch size before it is added to the sum, which is divided again."""
    honest = step.grid_gaussian

    def smaller(count: int, noise: float, sensitivity: float, grid: float, *given: Any) -> Any:
        return np.rint(honest(count, noise, sensitivity, grid, *given) / 400 / grid) * grid

    monkeypatch.setattr(step, "grid_gaussian", smaller)


def _seeded(count: int) -> bytes:
    return bytes(AES.new(bytes(32), AES.MODE_CTR, nonce=b"").encrypt(bytes(count)))


def noise_seeded_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = step.grid_gaussian
    monkeypatch.setattr(step, "grid_gaussian", lambda *given: honest(*given[:4], _seeded, *given[5:]))


def noise_seeded_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps differ, but the next run makes the same noise again."""
    honest = PrivateOptimizer.__init__

    def init(self: PrivateOptimizer, *args: Any, **named: Any) -> None:
        honest(self, *args, **named)
        stream = AES.new(bytes(32), AES.MODE_CTR, nonce=b"")
        self._source = lambda count: bytes(stream.encrypt(bytes(count)))

    monkeypatch.setattr(PrivateOptimizer, "__init__", init)


def rate_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accounting takes 1/len(loader) for the sample rate; batches are drawn as before."""

    def event(*, sample_rate: float, noise_multiplier: float, steps: int) -> PoissonSampledGaussian:
        return PoissonSampledGaussian(sample_rate=1.0 / steps, noise_multiplier=noise_multiplier, steps=steps)

    monkeypatch.setattr(execution_plan, "PoissonSampledGaussian", event)


def shuffled_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one size, accounted as if drawn by chance."""

    class Fixed(execution_plan.PoissonSampler):
        def __iter__(self) -> Any:
            rng = np.random.default_rng()
            for _ in range(self.steps):
                yield rng.choice(self.size, int(self.rate * self.size), replace=False).tolist()

    monkeypatch.setattr(execution_plan, "PoissonSampler", Fixed)


BROKEN: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    no_clipping: "Every record is clipped",
    noise_over_batch_size: "Noise is as large as claimed",
    noise_seeded_each_step: "Noise is never used twice",
    noise_seeded_each_run: "Noise is never used twice",
    rate_of_the_loader: "Records are drawn at the claimed rate",
    shuffled_batches: "Batch sizes vary as Poisson samples do",
}


def test_the_honest_trainer_passes() -> None:
    # Each of fifteen checks has a false-alarm rate of 1e-6. The canaries' bound is an honest lower bound on a mechanism
    # that spends what it claims: above it with probability below 5 % by the theorem, in fact far below.
    found = probe(PROMISE)
    assert not found.violated, found.sentence
    assert [check.violated for check in found.checks] == [False] * 15
    checks = {check.name: check for check in found.checks}
    assert found.checks[0].observed == pytest.approx(found.checks[0].expected, rel=0.02)
    assert checks["Records are drawn at the claimed rate"].observed == pytest.approx(0.4, abs=0.02)
    assert checks["Every record is clipped"].observed == pytest.approx(1.0, abs=0.2)
    assert "is not seen" in found.sentence
    bound = found.canaries.bounds[0]
    assert found.canaries.claimed == pytest.approx(2.0, rel=2e-3)
    assert bound.ceiling > found.canaries.claimed
    assert found.canaries.null is not None
    assert found.canaries.null.holds


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_trainer_is_caught(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    found = probe(PROMISE)
    assert found.violated
    caught = {check.name for check in found.checks if check.violated}
    assert BROKEN[breaks] in caught
    if breaks in (no_clipping, noise_over_batch_size):  # the canaries see it in the final model alone
        assert found.canaries.finding == "violated"
        assert found.canaries.bounds[0].epsilon > found.canaries.claimed


def test_the_users_ledger_pays_nothing(tmp_path: Any) -> None:
    promise = dataclasses.replace(PROMISE, ledger=tmp_path / "ledger.jsonl")
    probe(promise)
    assert not (tmp_path / "ledger.jsonl").exists()
    assert promise.spent().epsilon == 0.0


def test_a_trainer_of_ones_own() -> None:
    # The plain loop, which claims privacy and adds none: everything but the sampling is wrong.
    found = probe(PROMISE, wrap=_without_privacy)
    caught = {check.name for check in found.checks if check.violated}
    assert caught >= {"Noise is as large as claimed", "Noise is never used twice", "Every record is clipped"}


def _without_privacy(promise: Privacy) -> Any:
    def wrap(model: Any, optimizer: Any, loader: Any) -> Any:
        ledger = promise._open()
        ledger.bind("data", promise.delta)
        ledger.append(PoissonSampledGaussian(sample_rate=0.4, noise_multiplier=3.0, steps=24), after=0)
        return model, optimizer, loader

    return wrap


@pytest.mark.parametrize("kind", [AdaptiveClip(start=0.3, share=0.6), PerLayerClip(0.3)])
def test_honest_adaptive_and_layered_clipping_in_chunks_is_not_accused(kind: Any) -> None:
    found = probe(Privacy(epsilon=2.0, delta=1e-5, max_grad_norm=kind, max_physical_batch_size=150))
    assert not found.violated, found.sentence


def test_a_count_that_takes_no_share_of_the_sensitivity_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector gets noise z, as if the count cost nothing."""
    honest = PrivateOptimizer._independent_noise

    def smaller(self: PrivateOptimizer, count: int, grid: float, whole: int) -> Any:
        return honest(self, count, grid, whole) * np.sqrt(1 - self.clipping.setting.share)  # type: ignore[union-attr]

    monkeypatch.setattr(PrivateOptimizer, "_independent_noise", smaller)
    found = probe(Privacy(epsilon=2.0, delta=1e-5, max_grad_norm=AdaptiveClip(start=0.3, share=0.3)))
    assert "Noise is as large as claimed" in [check.name for check in found.checks if check.violated]


def test_noise_reuse_false_alarms_and_power() -> None:
    # p-values of independent noise: 2000 draws, those below .01 are Binomial(2000, <= .01); above 37 has
    # probability 1e-4.
    rng = np.random.default_rng(6)
    low = sum((noise_reuse(rng.normal(size=(8, 60))).p_value or 0.0) < 0.01 for _ in range(2000))
    assert low <= 37
    assert low >= 5  # the test is not asleep
    rows = rng.normal(size=(6, 400))
    rows[4] = -rows[1]
    assert noise_reuse(rows).violated
    rows[4] = 0.6 * rows[1] + 0.8 * rng.normal(size=400)  # noise shared in part
    assert (noise_reuse(rows).p_value or 0.0) < FALSE_ALARMS
