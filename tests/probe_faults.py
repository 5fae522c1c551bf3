"""Sixty and more ways in which a private trainer goes wrong: the real one, with one thing changed.

Each entry is (group, name): a function that breaks the trainer by a monkeypatch. Noise is changed between its draw and
the sum, gradients between clipping and the sum, batches where they are drawn, the schedule by the number of the step.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.dpsgd import execution_plan
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer

Break = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[tuple[str, str], Break] = {}
_counter = itertools.count(1000)


def _noise(group: str, name: str, change: Callable[[PrivateOptimizer, Any, int], Any]) -> None:
    """change: of optimizer, honest noise and the number of the step, from 0 on, to the noise that is added."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest = PrivateOptimizer._independent_noise

        def noise(self: Any, count: int, grid: float, whole: int) -> Any:
            self.made = getattr(self, "made", -1) + 1
            made = np.asarray(change(self, honest(self, count, grid, whole), self.made), dtype=np.float64)
            return np.rint(made / grid) * grid

        monkeypatch.setattr(PrivateOptimizer, "_independent_noise", noise)

    FAULTS[group, name] = broken


def _kept(change: Callable[[Any, Any, int], Any]) -> Callable[[PrivateOptimizer, Any, int], Any]:
    """change: of what it returned the step before (None at first), the honest noise and the step's number."""

    def with_memory(self: Any, honest: Any, step: int) -> Any:
        self.memory = change(getattr(self, "memory", None), honest, step)
        return self.memory

    return with_memory


def _deviation(self: PrivateOptimizer) -> float:
    return self.noise_multiplier * self._sensitivity


def _seeded(seed: Callable[[PrivateOptimizer, int], int]) -> Callable[[PrivateOptimizer, Any, int], Any]:
    return lambda o, z, t: np.random.default_rng(seed(o, t)).normal(size=len(z)) * _deviation(o)


def _as_large(made: Any, honest: Any) -> Any:
    """`made`, scaled to the deviation of what is honest."""
    return made * (honest.std() / made.std())


def _rows(z: Any) -> int:
    return math.isqrt(len(z))


_NOISE = {
    "2 percent less": lambda o, z, t: 0.98 * z,
    "over the batch size": lambda o, z, t: z / o.expected_batch_size,
    "none": lambda o, z, t: 0.0 * z,
    "the same in every step": _kept(lambda old, z, t: z if old is None else old),
    "again in every other step": _kept(lambda old, z, t: z if t % 2 == 0 else old),
    "again with the sign turned": _kept(lambda old, z, t: z if t % 2 == 0 else -old),
    "rolled by a coordinate": _kept(lambda old, z, t: z if t == 0 else np.roll(old, 1)),
    "a tenth of the step before": _kept(lambda old, z, t: z if t == 0 else math.sqrt(0.99) * z + 0.1 * old),
    "again in another order": _kept(lambda old, z, t: z if t == 0 else np.random.default_rng(t).permutation(old)),
    "mirrored": _kept(lambda old, z, t: z if t % 2 == 0 else old[::-1]),
    "seeded by the step": _seeded(lambda o, t: t),
    "seeded by the clock": _seeded(lambda o, t: int(time.time())),
    "seeded by the clock in nanoseconds": _seeded(lambda o, t: time.time_ns()),
    "seeded by a counter of the process": _seeded(lambda o, t: next(_counter)),
    "from the generator of torch": lambda o, z, t: torch.randn(len(z)).double().numpy() * _deviation(o),
    "from the generator of random": _seeded(lambda o, t: random.getrandbits(32)),
    "in too few independent numbers": lambda o, z, t: _as_large(_mixing(len(z)) @ z[:200], z),
}
_SHAPE = {
    "uniform": lambda o, z, t: np.random.default_rng().uniform(-1, 1, len(z)) * math.sqrt(3) * _deviation(o),
    "Laplace": lambda o, z, t: np.random.default_rng().laplace(size=len(z)) * _deviation(o) / math.sqrt(2),
    "Student, five degrees": lambda o, z, t: np.random.default_rng().standard_t(5, len(z)) * _deviation(o) * 0.7746,
    "signs": lambda o, z, t: np.sign(z) * _deviation(o),
    "cut at 1.5 deviations": lambda o, z, t: np.clip(z, -1.5 * _deviation(o), 1.5 * _deviation(o)),
    "cut at 2.5, scaled": lambda o, z, t: _as_large(np.clip(z, -2.5 * _deviation(o), 2.5 * _deviation(o)), z),
    "tiled over coordinates": lambda o, z, t: np.resize(z[:100], len(z)),
    "one number per step": lambda o, z, t: np.full(len(z), z[0]),
    "none on half of the coordinates": lambda o, z, t: z * (np.arange(len(z)) < len(z) // 2),
    "none on the biases": lambda o, z, t: z * (np.arange(len(z)) < len(z) - 9),
    "none on the last bias": lambda o, z, t: z * (np.arange(len(z)) < len(z) - 1),
    "a tenth on some coordinates": lambda o, z, t: z * np.where(np.arange(len(z)) % 50, 1.0, 0.1),
    "correlated between neighbours": lambda o, z, t: _as_large(z + 0.1 * np.roll(z, 1), z),
    "the same in the biases as in the weights": lambda o, z, t: np.concatenate([z[:-9], z[:9]]),
    "rounded to deviations": lambda o, z, t: np.rint(z / _deviation(o)) * _deviation(o),
    "larger in larger batches": lambda o, z, t: z * o._batch / o.expected_batch_size,
    "two sizes": lambda o, z, t: z * np.where(np.arange(len(z)) % 2, math.sqrt(0.3), math.sqrt(1.7)),
}
_SCHEDULE = {
    "none in every second step": lambda o, z, t: z * (t % 2),
    "none in one step of 24": lambda o, z, t: z * (t % 24 != 7),
    "none in the first step": lambda o, z, t: z * (t > 0),
    "none in the last step": lambda o, z, t: z * (t < 35),
    "none from step 30 on": lambda o, z, t: z * (t < 30),
    "halved from step 20 on": lambda o, z, t: z * (0.5 if t >= 20 else 1.0),
    "falling over steps": lambda o, z, t: z * (1.2 - t / 36),
    "less in every fifth step": lambda o, z, t: z * (0.9 if t % 5 == 0 else 1.05),
    "repeated after 20 steps": lambda o, z, t: _remembered(o, z, t, 20),
    "repeated in the last step": lambda o, z, t: _remembered(o, z, t, 35),
}
_mixed: dict[int, Any] = {}


def _mixing(length: int) -> Any:
    if length not in _mixed:
        _mixed[length] = np.random.default_rng(5).normal(size=(length, 200))
    return _mixed[length]


def _remembered(o: Any, z: Any, step: int, after: int) -> Any:
    o.all = [*getattr(o, "all", []), z]
    return o.all[step - after] if step >= after else z


for kind, table in (("noise", _NOISE), ("shape", _SHAPE), ("schedule", _SCHEDULE)):
    for title, made in table.items():
        _noise(kind, title, made)


def _batch_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PrivateOptimizer.expect

    def expect(self: Any, drawn: int, **named: Any) -> None:
        self._batch = drawn
        honest(self, drawn, **named)

    monkeypatch.setattr(PrivateOptimizer, "expect", expect)


_larger = FAULTS["shape", "larger in larger batches"]
FAULTS["shape", "larger in larger batches"] = lambda m: (_batch_is_known(m), _larger(m))[1]


def _clipping(name: str, change: Callable[[Any, Any, list[Any], float], Any], group: str = "clipping") -> None:
    """change: of optimizer, honest factors (parameters, batch), norms of the same shape, and C, to other factors."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest = PrivateOptimizer._clip_factors

        def factors(self: Any, samples: list[Any]) -> Any:
            made, *rest = honest(self, samples)
            self.clipped = getattr(self, "clipped", -1) + 1
            norms = torch.stack([each.norms() for each in samples]).double()
            changed = change(self, torch.stack([each.double() for each in made]), norms, self.max_grad_norm)
            return list(changed), *rest

        monkeypatch.setattr(PrivateOptimizer, "_clip_factors", factors)

    FAULTS[group, name] = broken


def _to(norms: Any, clip: Any) -> Any:
    return (clip / norms.clamp(min=1e-12)).clamp(max=1.0)


def _only(place: int) -> Callable[[Any, Any, Any, float], Any]:
    """The parameter at `place` keeps its gradient as it is."""

    def change(_: Any, honest: Any, norms: Any, clip: float) -> Any:
        changed = honest.clone()
        changed[place] = 1.0
        return changed

    return change


_whole = torch.linalg.vector_norm
for title, turned in {
    "none": lambda o, f, n, c: torch.ones_like(f),
    "to 1.5 C": lambda o, f, n, c: _to(_whole(n, dim=0), 1.5 * c).expand_as(f),
    "to 3 C": lambda o, f, n, c: _to(_whole(n, dim=0), 3.0 * c).expand_as(f),
    "to 6 C": lambda o, f, n, c: _to(_whole(n, dim=0), 6.0 * c).expand_as(f),
    "to 24 C": lambda o, f, n, c: _to(_whole(n, dim=0), 24.0 * c).expand_as(f),
    "of each parameter apart": lambda o, f, n, c: _to(n, c),
    "of each layer apart": lambda o, f, n, c: torch.cat(
        [_to(_whole(n[:2], dim=0), c).expand(2, -1), _to(_whole(n[2:], dim=0), c).expand(2, -1)]
    ),
    "not of the hidden bias": _only(1),
    "not of the last weights": _only(2),
    "not of the last bias": _only(3),
    "not of the hidden weights": _only(0),
    "by the first parameter's norm": lambda o, f, n, c: _to(n[:1], c).expand_as(f),
    "by the sum's norm": lambda o, f, n, c: _to(_whole(n) / n.shape[1], c).expand_as(f),
    "by the mean norm": lambda o, f, n, c: _to(_whole(n, dim=0).mean(), c).expand_as(f),
    "not above 100 C": lambda o, f, n, c: torch.where(_whole(n, dim=0) > 100 * c, 1.0, f),
    "not below 10 C": lambda o, f, n, c: torch.where(_whole(n, dim=0) < 10 * c, 1.0, f),
    "by the square root of the norm": lambda o, f, n, c: _to(_whole(n, dim=0).sqrt(), c).expand_as(f),
    "by the largest parameter's norm": lambda o, f, n, c: _to(n.amax(dim=0), c * 1.2).expand_as(f),
}.items():
    _clipping(title, turned)
_clipping("off from step 25 on", lambda o, f, n, c: f if o.clipped < 25 else torch.ones_like(f), "schedule")
_clipping("off in step 11", lambda o, f, n, c: torch.ones_like(f) if o.clipped == 10 else f, "schedule")
_clipping("to 4 C in every fourth step", lambda o, f, n, c: f * (4.0 if o.clipped % 4 == 0 else 1.0), "schedule")


def _carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a step's clipped sum is added to the next one again, before the noise."""
    honest = PrivateOptimizer._release

    def release(self: Any, pending: Any) -> None:
        own = pending.total.clone()
        pending.total.add_(0.5 * getattr(self, "before", torch.zeros_like(own)))
        self.before = own
        honest(self, pending)

    monkeypatch.setattr(PrivateOptimizer, "_release", release)


FAULTS["schedule", "a step's records move the next one again"] = _carried


def _realised_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is over the records that were drawn, and not over the public number."""
    _batch_is_known(monkeypatch)
    honest = PrivateOptimizer._release

    def release(self: Any, pending: Any) -> None:
        expected, self.expected_batch_size = self.expected_batch_size, self._batch
        honest(self, pending)
        self.expected_batch_size = expected

    monkeypatch.setattr(PrivateOptimizer, "_release", release)


FAULTS["shape", "divided by the realised batch size"] = _realised_size


def _sampler(name: str, batches: Callable[[int, float, int], Any], group: str = "sampling") -> None:
    """batches: of size, rate and the number of the pass, which is 0 at first, to the batches of a pass."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        class Other(execution_plan.PoissonSampler):
            passed = -1

            def __iter__(self) -> Any:
                self.passed += 1
                for batch in itertools.islice(batches(self.size, float(self.rate), self.passed), self.steps):
                    yield np.asarray(batch).tolist()

        monkeypatch.setattr(execution_plan, "PoissonSampler", Other)

    FAULTS[group, name] = broken


def _rng() -> np.random.Generator:
    return np.random.default_rng()


def _poisson(size: int, rate: Any, rng: np.random.Generator | None = None) -> Any:
    return np.flatnonzero((rng or _rng()).random(size) < rate)


def _shuffled(size: int, rate: float, rng: np.random.Generator) -> Any:
    """As a DataLoader with shuffle=True does, with a short last batch."""
    return np.array_split(rng.permutation(size), np.arange(int(size * rate), size, int(size * rate)))


_SAME = _poisson(1000, 0.4, np.random.default_rng(3))
_HALF = np.arange(1000) % 2 == 0
_TWICE = _rng().permutation(1000) < 300
_PICKED: dict[str, Callable[[int, float, int], Any]] = {
    "a shuffled DataLoader": lambda n, q, p: _shuffled(n, q, _rng()),
    "fixed sizes": lambda n, q, p: (_rng().choice(n, int(n * q), replace=False) for _ in range(9)),
    "the same records in every step": lambda n, q, p: itertools.repeat(_SAME),
    "file order": lambda n, q, p: iter(np.array_split(np.arange(n), [400, 800])),
    "one batch of each pass again in the next": lambda n, q, p: (
        _poisson(n, q, np.random.default_rng(p // 2)) if t == 0 else _poisson(n, q) for t in range(9)
    ),
    "a public seed": lambda n, q, p: (_poisson(n, q, np.random.default_rng((7, p, t))) for t in range(9)),
    "the generator of numpy": lambda n, q, p: (np.flatnonzero(np.random.rand(n) < q) for _ in range(9)),
    "with replacement": lambda n, q, p: (_rng().integers(0, n, _rng().binomial(n, q)) for _ in range(9)),
    "a window at a random place": lambda n, q, p: (
        (np.arange(_rng().binomial(n, q)) + _rng().integers(n)) % n for _ in range(9)
    ),
    "strata of five": lambda n, q, p: (
        (np.arange(0, n, 5)[:, None] + np.argsort(_rng().random((n // 5, 5)), axis=1)[:, :2])[
            _rng().random(n // 5) < 1.0
        ].reshape(-1)
        for _ in range(9)
    ),
    "neighbours together": lambda n, q, p: (np.flatnonzero(np.repeat(_rng().random(n // 2) < q, 2)) for _ in range(9)),
    "half of the data twice as often": lambda n, q, p: (
        _poisson(n, np.where(_HALF, q * 4 / 3, q * 2 / 3)) for _ in range(9)
    ),
    "a record in every step": lambda n, q, p: (np.union1d(_poisson(n, q), [3]) for _ in range(9)),
    "10 percent more": lambda n, q, p: (_poisson(n, 1.1 * q) for _ in range(9)),
    "records stay for two steps": lambda n, q, p: _sticky(n, q),
    "wilder sizes": lambda n, q, p: (_poisson(n, q * (0.75 if _rng().random() < 0.5 else 1.25)) for _ in range(9)),
    "never a record in two steps running": lambda n, q, p: _avoiding(n, q),
}


def _sticky(n: int, q: float) -> Any:
    before = _rng().random(n) < q
    while True:
        yield np.flatnonzero(before)
        keep = _rng().random(n) < 0.3
        before = np.where(keep, before, _rng().random(n) < q)


def _avoiding(n: int, q: float) -> Any:
    before = np.zeros(n, dtype=bool)
    while True:
        now = (_rng().random(n) < q / (1 - q)) & ~before
        yield np.flatnonzero(now)
        before = now


for title, drawn in _PICKED.items():
    _sampler(title, drawn)
_sampler(
    "the same batch from pass 6 on",
    lambda n, q, p: (_SAME if p >= 6 else _poisson(n, q) for _ in range(9)),
    "schedule",
)
_sampler(
    "every record in the last pass", lambda n, q, p: (_poisson(n, q if p < 11 else 1.0) for _ in range(9)), "schedule"
)


def _rate_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accounting takes 1/len(loader) for the sample rate; batches are drawn as before."""

    def event(*, sample_rate: float, noise_multiplier: float, steps: int) -> PoissonSampledGaussian:
        return PoissonSampledGaussian(sample_rate=1.0 / steps, noise_multiplier=noise_multiplier, steps=steps)

    monkeypatch.setattr(execution_plan, "PoissonSampledGaussian", event)


def _four_steps_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass has a step more than its entry in the ledger."""

    class Longer(execution_plan.PoissonSampler):
        def __iter__(self) -> Any:
            yield from super().__iter__()
            yield _poisson(self.size, float(self.rate)).tolist()

    monkeypatch.setattr(execution_plan, "PoissonSampler", Longer)


FAULTS["sampling", "accounted as 1 / len(loader)"] = _rate_of_the_loader
FAULTS["schedule", "steps that are not in the ledger"] = _four_steps_for_three
