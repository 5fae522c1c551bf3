"""Each algorithm against its formulas in float64 numpy, through the sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flat_arguments import federate

from choral import Homomorphic, Masked, Plain
from choral.trainers.algorithms import (
    DANE,
    FSVRG,
    GD,
    KINDS,
    CoCoA,
    FedAdam,
    FedAvg,
    FedNova,
    FedProx,
    FedSGD,
    FedYogi,
    Scaffold,
)
from choral.trainers.task.seeding import seed_of

ROUNDS = 4
RIDGE = 0.02


def fedavg(o, mu=0.0):
    w = o.start
    for _ in range(ROUNDS):
        start = w
        w = o.mean({name: o.sgd(name, start, lambda v, start=start: mu * (v - start))[0] for name in o.data})
    return w


def scaffold(o, server_rate):
    w, c = o.start, np.zeros_like(o.start)
    own = {name: np.zeros_like(w) for name in o.data}
    for _ in range(ROUNDS):
        ends, fresh = {}, {}
        for name in o.data:
            end, steps = o.sgd(name, w, lambda _, shift=c - own[name]: shift)
            ends[name], fresh[name] = end, own[name] - c + (w - end) / (steps * 0.4)
        w = w + server_rate * (o.mean(ends) - w)
        own = fresh
        c = o.mean(own)
    return w


def fedopt(o, yogi):
    w, m, v = o.start, np.zeros_like(o.start), np.full_like(o.start, 1e-4)
    for _ in range(ROUNDS):
        d = o.mean({name: o.sgd(name, w)[0] for name in o.data}) - w
        m = 0.9 * m + 0.1 * d
        v = v - 0.01 * d**2 * np.sign(v - d**2) if yogi else 0.99 * v + 0.01 * d**2
        w = w + 0.05 * m / (np.sqrt(v) + 0.01)
    return w


def fednova(o):
    w = o.start
    for _ in range(ROUNDS):
        ends = {name: o.sgd(name, w) for name in o.data}
        effective = o.mean({name: np.array(float(steps)) for name, (_, steps) in ends.items()})
        w = w + effective * o.mean({name: (end - w) / steps for name, (end, steps) in ends.items()})
    return w


def gd(o):
    w = o.start
    for _ in range(ROUNDS):
        w = w - 0.5 * (o.mean({name: o.gradient(name, w) for name in o.data}) + RIDGE * w)
    return w


def fsvrg(o, step, scaled, over_examples=True, plain_mean=False, extra=0.0):
    w, parties = o.start, len(o.data)
    held = {name: (x != 0).sum(0) for name, (x, _) in o.data.items()}
    phi, omega = sum(held.values()) / o.total, sum(counts > 0 for counts in held.values())
    for number in range(1, ROUNDS + 1):
        g = o.mean({name: o.gradient(name, w) for name in o.data}) + RIDGE * w
        changes = {}
        for name in o.data:
            own = held[name] / o.counts[name]
            s = np.array([p / q if q else 1.0 for p, q in zip(phi, own, strict=True)]) if scaled else 1.0
            h = step / o.counts[name] if over_examples else step
            v = w
            for i in o.order(name, number):
                one = slice(i, i + 1)
                v = v - h * (s * (o.gradient(name, v, one) - o.gradient(name, w, one)) + g + (RIDGE + extra) * (v - w))
            changes[name] = v - w
        change = sum(changes.values()) / parties if plain_mean else o.mean(changes)
        w = w + change * (parties / np.maximum(omega, 1) if scaled else 1.0)
    return w


def dane(o, eta, mu):
    """Exactly, by Newton on the local problem as it stands in the paper."""
    w = o.start
    for _ in range(ROUNDS):
        local = {name: o.gradient(name, w) + RIDGE * w for name in o.data}
        g, ends = o.mean(local), []
        for name in o.data:
            v = w
            for _ in range(40):
                slope = o.gradient(name, v) + RIDGE * v - (local[name] - eta * g) + mu * (v - w)
                v = v - np.linalg.solve(o.hessian(name, v) + (RIDGE + mu) * np.eye(len(w)), slope)
            ends.append(v)
        w = np.mean(ends, axis=0)
    return w


def cocoa(o):
    """Coordinates by bisection of the derivative."""
    w, parties = np.zeros_like(o.start), len(o.data)
    dual = {name: np.zeros(count) for name, count in o.counts.items()}
    for number in range(1, ROUNDS + 1):
        total = np.zeros_like(w)
        for name, (x, y) in o.data.items():
            v = w.copy()
            for i in o.order(name, number):
                q, old = parties * x[i] @ x[i] / (RIDGE * o.total), dual[name][i]
                low, high = 1e-300, 1 - 1e-16
                for _ in range(200):
                    a = (low + high) / 2
                    if np.log((1 - a) / a) - y[i] * (x[i] @ v) - q * (a - old) > 0:
                        low = a
                    else:
                        high = a
                v = v + parties * (a - old) * y[i] * x[i] / (RIDGE * o.total)
                total += (a - old) * y[i] * x[i] / (RIDGE * o.total)
                dual[name][i] = a
        w = w + total
    blocks = sum((dual[name] * y) @ x for name, (x, y) in o.data.items()) / (RIDGE * o.total)
    assert np.allclose(w, blocks)
    return w


def fedsgd(o, batch, steps, rate, momentum):
    """Draws are the trainer's, each step's its own; the sum over those drawn, divided by B."""
    w, m = o.start, np.zeros_like(o.start)
    for number in range(1, ROUNDS + 1):
        for step in range(steps):
            total = np.zeros_like(w)
            for name in o.data:
                draws = torch.Generator().manual_seed(seed_of(o.seed, number, f"{name}|step {step}, draw"))
                rows = (torch.rand(o.counts[name], generator=draws, dtype=torch.float64) < batch / o.total).numpy()
                total += o.gradient(name, w, rows) * rows.sum() if rows.any() else 0.0
            m = momentum * m + total / batch
            w = w - rate * m
    return w


CASES = {
    "fedavg": (FedAvg(), fedavg),
    "fedprox": (FedProx(mu=0.3), lambda o: fedavg(o, mu=0.3)),
    "scaffold": (Scaffold(server_rate=0.8), lambda o: scaffold(o, 0.8)),
    "fedadam": (FedAdam(server_rate=0.05, tau=0.01), lambda o: fedopt(o, yogi=False)),
    "fedyogi": (FedYogi(server_rate=0.05, tau=0.01), lambda o: fedopt(o, yogi=True)),
    "fednova": (FedNova(), fednova),
    "fedsgd": (
        FedSGD(batch_size=20, steps_per_round=3, learning_rate=0.6, momentum=0.5),
        lambda o: fedsgd(o, 20, 3, 0.6, 0.5),
    ),
    "gd": (GD(rate=0.5, ridge=RIDGE), gd),
    "fsvrg": (FSVRG(step=1.5, ridge=RIDGE), lambda o: fsvrg(o, 1.5, scaled=True)),
    "fsvrg-naive": (
        FSVRG(step=0.1, ridge=RIDGE, scaled=False, over_examples=False, mean="parties"),
        lambda o: fsvrg(o, 0.1, scaled=False, over_examples=False, plain_mean=True),
    ),
    "dane": (DANE(eta=0.9, mu=0.2, ridge=RIDGE), lambda o: dane(o, 0.9, 0.2)),
    "dane-svrg": (
        DANE(mu=0.2, ridge=RIDGE, solver="svrg", step=0.1),
        lambda o: fsvrg(o, 0.1, scaled=False, over_examples=False, plain_mean=True, extra=0.2),
    ),
    "cocoa": (CoCoA(ridge=RIDGE), cocoa),
}
SUMS = {"plain": Plain(), "masked": Masked()}


def flat(run):
    return torch.cat([tensor.reshape(-1) for tensor in run.state.values()]).double().numpy()


@pytest.mark.parametrize("name", CASES)
def test_equals_its_formulas_in_numpy(convex, oracle, name):
    algorithm, formulas = CASES[name]
    expected = formulas(oracle)
    plain, masked = (federate(**convex(), algorithm=algorithm, secure_sum=kind) for kind in SUMS.values())
    assert all(torch.equal(plain.state[key], masked.state[key]) for key in plain.state)
    # float32 sums of a hundred steps of size about 1: a few ulps each; the formulas differ by 1e-2 and more.
    assert np.abs(flat(plain) - expected).max() < 5e-5
    assert np.abs(expected - oracle.start).max() > 0.05


def test_the_cases_can_be_told_apart(oracle):
    ends = [formulas(oracle) for _, formulas in CASES.values()]
    assert min(np.abs(a - b).max() for i, a in enumerate(ends) for b in ends[:i]) > 5e-4  # ten tolerances
    assert {algorithm.kind for algorithm, _ in CASES.values()} == set(KINDS)


@pytest.mark.parametrize("name", ["scaffold", "fsvrg"])
def test_homomorphic_sums_equal_plain_exactly(convex, name):
    algorithm = CASES[name][0]
    plain = federate(**convex(rounds=2), algorithm=algorithm)
    secure = federate(**convex(rounds=2), algorithm=algorithm, secure_sum=Homomorphic())
    assert all(torch.equal(plain.state[key], secure.state[key]) for key in plain.state)


@pytest.mark.parametrize(
    ("algorithm", "within"),
    [(GD(rate=2.0, ridge=RIDGE), 1e-2), (FSVRG(step=3.0, ridge=RIDGE), 1e-3), (DANE(mu=0.1, ridge=RIDGE), 1e-5),
     (CoCoA(ridge=RIDGE), 1e-2)],
    ids=["gd", "fsvrg", "dane", "cocoa"],
)  # fmt: skip
def test_goes_to_the_optimum(convex, oracle, algorithm, within):
    run = federate(**convex(rounds=25), algorithm=algorithm)
    best = oracle.objective(oracle.optimum(RIDGE), RIDGE)
    assert oracle.objective(oracle.start, RIDGE) - best > 0.2
    assert oracle.objective(flat(run), RIDGE) - best < within
