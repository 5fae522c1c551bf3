"""Attacks on sums of clients' updates: below the promised epsilon, and they catch half the noise.

Neighbours: one client sends its update or the zero vector. The adversary knows every other update, the rotation and the
colluders' messages, sees what the mechanism shows to it, and thresholds the projection on the client's update, which is
the likelihood-ratio test. Everything goes through `ClientPrivacyEngine`, `encode`, the sum modulo 2^bits and `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from choral.privacy import AdaptiveClip, ClientPrivacy, ClientPrivacyEngine, Ledger
from choral.privacy.client_level import central, client_noise_shares
from choral.privacy.client_level.client import ClientRound

DELTA = 0.1  # at which the cost is held against what is found
ALARM = 1e-6  # the probability that an honest mechanism is accused, at any threshold
# In units of the clipping norm; where projections are 0 without the client and 1 with it.
THRESHOLDS = (0.0, 1.25)
TRIALS = 4000

cheats = pytest.mark.parametrize("cheat", [1, 2], ids=["as promised", "half the noise"])
mechanisms = pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])


def lessen(monkeypatch: pytest.MonkeyPatch, cheat: int) -> None:
    """Make all noise of clients and servers `cheat` times smaller than what is calibrated and paid for."""
    table, gaussian = client_noise_shares.table, central.grid_gaussian
    monkeypatch.setattr(client_noise_shares, "table", lambda law, variance: table(law, variance / cheat**2))
    monkeypatch.setattr(central, "grid_gaussian", lambda *args: gaussian(*args) / cheat)


def check(found: float, promised: float, cheat: int) -> None:
    assert (found > promised) == (cheat > 1), (found, promised)
    if cheat == 1:
        assert found > 0.2 * promised  # the test is no weaker than it should be


@mechanisms
@cheats
def test_distributed(
    monkeypatch: pytest.MonkeyPatch, proved_epsilon: Callable[..., float], mechanism: Any, cheat: int
) -> None:
    """One sum of 3,600 clients with 10 colluders among them, after 20 % dropped out, at 20 bits.

    Client k's update is along coordinate k, so the coordinates of the decoded sum are its update and noise, a trial
    each: 3,590 with a client and 4,592 that no client has. (Rotated, unit vectors are orthogonal; the projections
    of thousands of independent noises on them are uncorrelated and Gaussian.)

    Promised are 1.06. Found are 0.36 +- 0.04 as promised, 1.5 +- 0.07 with half the noise.
    """
    lessen(monkeypatch, cheat)
    clients, survivors, colluders, length = 4500, 3600, 10, 8192
    privacy = ClientPrivacy(
        epsilon=3.0, delta=1e-4, min_survivors=survivors, colluders=colluders, mechanism=mechanism, bits=20
    )
    ledger = Ledger()
    engine = ClientPrivacyEngine(privacy, clients=clients, length=length, rounds=1, ledger=ledger)
    current = engine.begin()
    total = np.zeros(length, np.int64)
    update = torch.zeros(length)
    for k in range(survivors):
        update[k] = 5.0  # far above the clipping norm
        message = current.encode(update)
        update[k] = 0.0
        if k >= colluders:  # what colluders sent, the adversary subtracts
            total += message
    total = (total + (1 << 19)) % (1 << 20) - (1 << 19)
    sums = (current.decode(total, survivors) * survivors).numpy()
    promised = ledger.epsilon(DELTA)
    assert 1.0 < promised < 1.1  # the figures above are for this
    check(
        proved_epsilon(sums[colluders:survivors], sums[survivors:], THRESHOLDS, delta=DELTA, alarm=ALARM),
        promised,
        cheat,
    )


@mechanisms
@cheats
def test_local(
    monkeypatch: pytest.MonkeyPatch, proved_epsilon: Callable[..., float], mechanism: Any, cheat: int
) -> None:
    """The server sees each message by itself."""
    lessen(monkeypatch, cheat)
    privacy = ClientPrivacy(epsilon=1.05, delta=DELTA, noise="local", mechanism=mechanism, bits=20)
    engine = ClientPrivacyEngine(privacy, clients=5, length=1, rounds=1, ledger=Ledger())
    current = engine.begin()
    without, with_it = (
        np.array([engine.scheme.decode(current.encode(update), 1.0, current._signs)[0] for _ in range(TRIALS)])
        for update in (torch.zeros(1), torch.full((1,), 5.0))
    )
    check(proved_epsilon(with_it, without, THRESHOLDS, delta=DELTA, alarm=ALARM), engine.spent().epsilon, cheat)


@cheats
def test_central(monkeypatch: pytest.MonkeyPatch, proved_epsilon: Callable[..., float], cheat: int) -> None:
    """Whoever sees the mean, noisy by the server: `TRIALS` first rounds."""
    lessen(monkeypatch, cheat)
    engine = ClientPrivacyEngine(
        ClientPrivacy(epsilon=1.05, delta=DELTA, noise="central"), clients=5, length=2, rounds=1, ledger=Ledger()
    )
    others = torch.tensor([[0.3, 0.1], [-9.0, 2.0], [0.0, 0.5]])
    current = engine.begin()
    known = np.sum([current.encode(update) for update in others], axis=0)

    def release(update: torch.Tensor) -> float:
        fresh = ClientRound(engine, None, current._source)  # the same sum again, with other noise
        mean = fresh.decode(known + fresh.encode(update), 4)
        return float((4 * mean.numpy() - known * engine.scheme.grid) @ (0.6, 0.8))

    without, with_it = (
        np.array([release(update) for _ in range(TRIALS)]) for update in (torch.zeros(2), torch.tensor([3.0, 4.0]))
    )
    check(proved_epsilon(with_it, without, THRESHOLDS, delta=DELTA, alarm=ALARM), engine.spent().epsilon, cheat)


SHARE = 0.95  # of the squared sensitivity, to the count


@cheats
def test_the_count_of_adaptive_clipping(
    monkeypatch: pytest.MonkeyPatch, proved_epsilon: Callable[..., float], cheat: int
) -> None:
    """Whoever sees the next clipping norm, which tells whether the client's update was longer than the present one."""
    lessen(monkeypatch, cheat)
    adaptive = AdaptiveClip(start=1.0, share=SHARE, quantile=0.5, rate=0.2)
    privacy = ClientPrivacy(epsilon=1.05, delta=DELTA, noise="central", clip=adaptive)
    engine = ClientPrivacyEngine(privacy, clients=9, length=2, rounds=1, ledger=Ledger())
    current = engine.begin()
    others = torch.tensor(
        [[0.3, 0.1]] * 4 + [[-9.0, 2.0]] * 4
    )  # four shorter, four longer: the noisy share is about 1/2
    known = np.sum([current.encode(update) for update in others], axis=0)

    def release(update: torch.Tensor) -> float:
        engine.clip = adaptive.start
        fresh = ClientRound(engine, None, current._source)
        fresh.decode(known + fresh.encode(update), 9)
        within = adaptive.quantile - math.log(engine.clip / adaptive.start) / adaptive.rate
        return (0.5 - within) * 2 * 9 * math.sqrt(SHARE)  # 0 without the client, sqrt(SHARE) with it

    without, with_it = (
        np.array([release(update) for _ in range(TRIALS)]) for update in (torch.zeros(2), torch.tensor([3.0, 4.0]))
    )
    check(proved_epsilon(with_it, without, THRESHOLDS, delta=DELTA, alarm=ALARM), engine.spent().epsilon, cheat)


@pytest.mark.parametrize("noise", ["central", "local", "distributed"])
@pytest.mark.parametrize("share", [0.05, 0.95])
def test_zeroing_out_an_update_moves_its_message_by_no_more_than_the_sensitivity(
    monkeypatch: pytest.MonkeyPatch, noise: Any, share: float
) -> None:
    """Adaptive clipping, too: did the zero update say "short", one that says "long" would be too far from it."""
    monkeypatch.setattr(client_noise_shares, "table", lambda *_: SimpleNamespace(draw=lambda *_: 0, reach=0))
    privacy = ClientPrivacy(epsilon=8.0, delta=1e-3, noise=noise, clip=AdaptiveClip(start=1.0, share=share))
    engine = ClientPrivacyEngine(privacy, clients=20, length=15, rounds=1, ledger=Ledger())
    current = engine.begin()
    most = engine.scheme.sensitivity_squared if noise != "central" else engine.scheme.grid**-2
    zero = current.encode(torch.zeros(15))
    assert not zero.any()
    for norm in (1e-9, 0.5, 0.9999, 1.0001, 50.0):
        moved = current.encode(torch.full((15,), norm / math.sqrt(15))) - zero
        assert int((moved**2).sum()) <= most
    assert int((moved**2).sum()) > 0.9 * most - 16  # and what is paid for is used
