"""The probe of noise for whole clients: honest engines are passed, and each broken one is caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from choral.audits import probe_clients
from choral.audits.attacks import client_canaries
from choral.errors import ConfigError
from choral.privacy import AdaptiveClip, ClientPrivacy, ClientPrivacyEngine
from choral.privacy.client_level import central, client_noise_shares
from choral.privacy.noise.integer_tables import CumulativeTable

Break = Callable[[pytest.MonkeyPatch], None]
SHARED = ClientPrivacy(epsilon=4.0, delta=1e-5)
CENTRAL = ClientPrivacy(epsilon=4.0, delta=1e-5, noise="central")


def drawn(change: Callable[[Any, int], Any]) -> Break:
    """change: of one client's honest noise in a sum and how many were drawn before."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest, number = CumulativeTable.draw, itertools.count()
        monkeypatch.setattr(
            CumulativeTable, "draw",
            lambda self, count, source: np.rint(change(honest(self, count, source), next(number))).astype(np.int64),
        )  # fmt: skip

    return broken


def of_server(change: Callable[[Any, int], Any]) -> Break:
    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest, number = central.grid_gaussian, itertools.count()
        monkeypatch.setattr(central, "grid_gaussian", lambda *given: change(honest(*given), next(number)))

    return broken


def holders(of: Callable[[ClientPrivacyEngine], int]) -> Break:
    return lambda monkeypatch: monkeypatch.setattr(ClientPrivacyEngine, "holders", property(of))


def longer(factor: float, where: Any) -> Break:
    honest = client_noise_shares.clipping_factor
    return lambda monkeypatch: monkeypatch.setattr(where, "clipping_factor", lambda *given: factor * honest(*given))


def uniform(count: int) -> Any:
    return np.random.default_rng().uniform(-1.0, 1.0, count) * 3.0**0.5


def seeded(z: Any, number: int) -> Any:
    return np.random.default_rng(number).normal(size=len(z)) * z.std()


def unpaid(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ClientPrivacyEngine.append
    monkeypatch.setattr(
        ClientPrivacyEngine, "append",
        lambda self, release, plan=None: None if len(self.ledger.releases) > 20 else honest(self, release, plan),
    )  # fmt: skip


class Again:
    kept: Any = None

    def __call__(self, z: Any, number: int) -> Any:
        self.kept = z if number % 2 == 0 else self.kept
        return self.kept


FAULTS: dict[str, tuple[ClientPrivacy, Break]] = {
    "sized for all clients": (SHARED, holders(lambda engine: engine.clients)),
    "no margin for the colluder": (SHARED, holders(lambda engine: engine.min_survivors)),
    "one client adds none": (SHARED, drawn(lambda z, n: z * (n % 10 > 0))),
    "3 percent less": (SHARED, drawn(lambda z, n: 0.97 * z)),
    "none": (SHARED, drawn(lambda z, n: 0 * z)),
    "none from round 16 on": (SHARED, drawn(lambda z, n: z * (n % 240 < 160))),
    "none in one sum": (SHARED, drawn(lambda z, n: z * (n // 10 != 7))),
    "seeded by a counter": (SHARED, drawn(lambda z, n: seeded(z, n % 240))),
    "central: 2 percent less": (CENTRAL, of_server(lambda z, n: 0.98 * z)),
    "central: over the clients": (CENTRAL, of_server(lambda z, n: z / 20)),
    "central: uniform": (CENTRAL, of_server(lambda z, n: uniform(len(z)) * z.std())),
    "central: one draw for two sums": (CENTRAL, of_server(Again())),
    "central: rolled": (CENTRAL, of_server(lambda z, n: np.roll(seeded(z, 5), n % 24))),
    "central: none on a part": (CENTRAL, of_server(lambda z, n: z * (np.arange(len(z)) < 1400))),
    "central: seeded": (CENTRAL, of_server(lambda z, n: seeded(z, n % 24))),
    "central: clipped to 3": (CENTRAL, longer(3.0, central)),
    "central: not paid for": (CENTRAL, unpaid),
}  # fmt: skip


QUICK = ("no margin for the colluder", "one client adds none", "central: 2 percent less", "central: clipped to 3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAULTS]
)
def test_a_broken_engine_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a client of distributed noise is clipped too late needs no probe: the encoder itself refuses it."""
    promise, fault = FAULTS[name]
    fault(monkeypatch)
    found = probe_clients(
        promise, length=4000 if name.endswith("percent less") else 1500
    )  # chance hides 2 % once in 1e10
    assert any(check.violated for check in found.checks), found.sentence
    assert found.violated


HONEST = [
    SHARED,
    CENTRAL,
    ClientPrivacy(epsilon=2.0, delta=1e-5, mechanism="skellam", clip=0.3),
    ClientPrivacy(epsilon=8.0, delta=1e-5, noise="local", bits=16),
    ClientPrivacy(epsilon=4.0, delta=1e-5, clip=AdaptiveClip(start=2.0)),
    ClientPrivacy(epsilon=4.0, delta=1e-5, noise="central", sample_rate=0.5),
]


@pytest.mark.parametrize("side", [True, False])
def test_coins_that_are_all_alike_are_tossed_again(side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 512 probes of ten honest clients; the bound's confidence makes up for it."""
    tossed = 2 * [np.full(10, side), np.arange(10) % 3 == 0]  # of two engines
    monkeypatch.setattr(client_canaries, "flip_coins", lambda count: tossed.pop(0)[:count])
    held, plain = [], client_canaries.audit_scores
    monkeypatch.setattr(
        client_canaries, "audit_scores", lambda *args, **rest: held.append(rest["confidence"]) or plain(*args, **rest)
    )
    found = probe_clients(HONEST[0], rounds=4)
    assert tossed == []
    assert not found.violated
    assert held == [1 - 0.05 * (1 - 2**-9)]
    assert {bound.confidence for bound in found.canaries.bounds} == {0.95}
    assert "at 95\u00a0% confidence" in found.canaries.sentence


@pytest.mark.parametrize("promise", HONEST[:2], ids=["distributed", "central"])
def test_an_honest_engine_is_passed(promise: ClientPrivacy) -> None:
    """Six checks at 1e-6 each: 6e-6."""
    found = probe_clients(promise)
    assert not found.violated, found.sentence
    assert "Who is selected" in found.sentence
    assert found.canaries.unit == "client"


@pytest.mark.slow
def test_honest_engines_are_passed_forty_times_of_forty() -> None:
    for number in range(40):
        found = probe_clients(HONEST[number % len(HONEST)])
        assert not found.violated, found.sentence


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected >= 12"):
        probe_clients(SHARED, clients=5)
