"""A record whose gradient is not finite counts as one that is not there: no error, and the same sum of the others."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from choral.privacy import AdaptiveClip, Ledger, PerLayerClip, Privacy, PrivacyError, replace_layers
from choral.privacy.correlated.training_loop import CorrelatedPrivacy
from choral.privacy.dpsgd.clip_settings import ClippingNorm
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.per_sample.ghost_norms import Dense, Outer, Sparse
from choral.privacy.per_sample.model import with_per_sample_gradients

ROWS, BAD = 200, 77
GRID = 2e-4  # sums are rounded to a grid of about 2^-16, coordinate by coordinate
KINDS: dict[str, ClippingNorm] = {
    "one norm": 0.5,
    "by layer": PerLayerClip(0.5),
    "adaptive": AdaptiveClip(start=0.5),
}


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0][:, -1]  # type: ignore[no-any-return]


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "wide, by factors": (lambda: nn.Sequential(nn.Linear(64, 80), nn.Tanh(), Mean(), nn.Linear(80, 3)), (2, 64)),
    "written down": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 3)), (40, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        ),
        (2, 4, 4),
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.LayerNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        (2, 6),
    ),
    "by functorch": (lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3)), (6,)),
    "recurrent": (lambda: replace_layers(Last(nn.GRU(3, 3, batch_first=True))), (4, 3)),
}


def summed(
    name: str, clip: ClippingNorm, *, bad: float | None, rows: list[int], chunk: int, autocast: bool, first: bool
) -> torch.Tensor:
    """The step's gradient without noise, times the expected batch size, of records of which BAD may hold `bad`."""
    make, shape = MODELS[name]
    torch.manual_seed(3)
    model = make()
    x, y = torch.randn(ROWS, *shape), torch.randint(3, (ROWS,))
    if bad is not None:
        x[BAD].view(-1)[-1] = bad
    private = with_per_sample_gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        private,
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch_size=1,
        source=lambda count: b"\xff" * count,  # Gaussians of (almost) zero
    )

    def step(rows: list[int]) -> None:
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            optimizer.expect(len(part), first=start == 0, last=start + chunk >= len(rows))
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = nn.functional.cross_entropy(private(x[part]), y[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    if not first:  # the comparisons of the first batch are done
        step([i for i in range(20) if i != BAD])
    step(rows)
    return torch.cat([p.grad.double().reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later"])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_the_other_records(name: str, first: bool, bad: float) -> None:
    settings: dict[str, Any] = {"chunk": ROWS, "autocast": False, "first": first}
    others = [i for i in range(ROWS) if i != BAD]
    got = summed(name, 0.5, bad=bad, rows=list(range(ROWS)), **settings)
    want = summed(name, 0.5, bad=None, rows=others, **settings)
    assert want.norm() > 1.0
    if bad < math.inf:  # its gradient may be a number: then it counts for C at most
        assert float((got - want).norm()) <= 0.5 * (1 + 2**-9)
    else:
        assert float((got - want).norm()) <= GRID


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [ROWS, 64, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_for_every_clipping_in_chunks_and_in_mixed_precision(kind: str, chunk: int, autocast: bool) -> None:
    settings: dict[str, Any] = {"autocast": autocast, "first": True}
    others = [i for i in range(ROWS) if i != BAD]
    got = summed("linear", KINDS[kind], bad=math.inf, rows=list(range(ROWS)), chunk=chunk, **settings)
    # With chunks of one or two, the others keep the partners that they have beside the bad record.
    want = summed("linear", KINDS[kind], bad=None, rows=others, chunk=chunk, **settings)
    assert want.norm() > 1.0
    assert float((got - want).norm()) <= (2e-3 * float(want.norm()) if autocast else GRID)


def test_the_count_of_adaptive_clipping_leaves_the_record_out(problem: Any) -> None:
    """Its answer is the one of a record that is not there, 0: not that of a short or a long gradient."""
    norms = []
    for rows in (range(12), [i for i in range(12) if i != 5]):
        x, y = problem.x[list(rows)].clone(), problem.y[list(rows)]
        if len(x) == 12:
            x[5] = math.nan
        private = with_per_sample_gradients(problem.model())
        clip = AdaptiveClip(start=0.5)
        optimizer = PrivateOptimizer(
            torch.optim.SGD(private.parameters(), lr=0.0),
            private,
            noise_multiplier=1.0,
            max_grad_norm=clip,
            expected_batch_size=12,
            source=lambda count: b"\xff" * count,
        )
        optimizer.expect(len(x))
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
        norms.append(optimizer.clipping.norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert norms[0] != 0.5


def test_a_record_of_zero_norm_factor_leaves_no_nan_behind() -> None:
    """0 * inf is NaN: a factor of zero alone would spoil the sum of all."""
    gone, weights = torch.tensor([False, True, False]), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    a, g = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    a[1], g[1, 0, 0] = math.inf, math.nan
    rows = torch.bmm(g.mT, a).flatten(1)
    owner, row, values = torch.tensor([0, 1, 1, 2]), torch.tensor([3, 0, 3, 1]), torch.randn(4, 2)
    values[1] = math.inf
    for kind in (
        Dense(rows),
        Outer(lambda part: (a[part], g[part]), 3, (5, 4, 2)),
        Sparse(owner, row, values, 3, 4),
    ):
        kept = kind.without(gone)
        assert bool(kept.weighted_sum(weights).isfinite().all())
        assert bool(kept.norms().isfinite().all())
        assert float(kept.norms()[1]) == float(kept.dense()[1].norm()) == 0.0
        torch.testing.assert_close(kept.dense()[[0, 2]], kind.dense()[[0, 2]])


@pytest.mark.parametrize("promise", [Privacy, CorrelatedPrivacy])
@pytest.mark.parametrize("chunks", [None, 7])
def test_training_goes_on_and_nothing_tells_of_the_record(
    problem: Any, loop: Callable[..., int], promise: type[Privacy], chunks: int | None
) -> None:
    """With one infinite record among 200, five of five runs once ended, and none of five without it."""
    problem.x[BAD, 0] = math.inf
    for _ in range(3):
        privacy, model = promise(epsilon=5.0, delta=1e-3, epochs=2, max_physical_batch_size=chunks), problem.model()
        private, optimizer, loader = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
        loop(private, optimizer, loader, epochs=2)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert privacy.spent().steps == 20
        assert private.checked
        assert private.unmixed


def test_a_first_batch_with_one_good_record_ends_nothing_and_settles_no_check(problem: Any) -> None:
    x, y = problem.x[:3].clone(), problem.y[:3]
    x[1:] = math.nan
    private = with_per_sample_gradients(problem.model())
    optimizer = PrivateOptimizer(
        torch.optim.SGD(private.parameters(), lr=0.1),
        private,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=2,
        source=lambda count: b"\xff" * count,
    )
    for rows in (x, problem.x[:3]):
        assert not private.checked
        assert not private.unmixed
        optimizer.expect(3)
        nn.functional.cross_entropy(private(rows), y).backward()
        optimizer.step()
    assert private.checked
    assert private.unmixed


def test_only_who_asks_is_told_and_nothing_carries_the_number_out(make_problem: Any, loop: Callable[..., int]) -> None:
    problem = make_problem(n=200, batch_size=200)  # every record in every batch
    problem.x[BAD, 0] = math.nan
    ledger = Ledger()
    privacy, model = Privacy(epsilon=5.0, delta=1e-3, epochs=4), problem.model()
    private, optimizer, loader = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    with pytest.raises(PrivacyError, match="were not counted"):
        _ = optimizer.zeroed
    state = pickle.dumps(optimizer.state_dict())
    optimizer.count_zeroed()
    loop(private, optimizer, loader, epochs=4)
    assert optimizer.zeroed == 4
    assert "zeroed" not in repr(optimizer.state_dict())
    assert len(pickle.dumps(optimizer.state_dict())) == len(state)
    assert ledger.events == ()


def test_weights_that_are_not_finite_are_refused_whatever_the_records(problem: Any, loop: Callable[..., int]) -> None:
    """They are released, so that to stop for them tells nothing more."""
    privacy, model = Privacy(epsilon=5.0, delta=1e-3), problem.model()
    wrapped = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=math.inf), problem.loader())
    with pytest.raises(PrivacyError, match="diverged"):
        loop(*wrapped)
    with pytest.raises(PrivacyError, match="diverged"):
        next(iter(wrapped[2]))


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_detection_is_refused_whatever_the_records(problem: Any, loop: Callable[..., int]) -> None:
    wrapped = problem.wrapped()
    with torch.autograd.detect_anomaly(), pytest.raises(PrivacyError, match="anomaly detection"):
        loop(*wrapped)
