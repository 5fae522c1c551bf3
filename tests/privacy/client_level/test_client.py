"""The promise for whole clients: paid for before use, settled by who took part, never exceeded."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from choral.errors import ConfigError
from choral.privacy import (
    AdaptiveClip,
    BudgetExceededError,
    ClientPrivacy,
    ClientPrivacyEngine,
    EncodingError,
    Ledger,
    LedgerError,
    Privacy,
    PrivacyError,
    TooFewClientsError,
)
from choral.privacy.accounting import client_noise
from choral.privacy.noise.gaussian import os_stream

LENGTH, CLIENTS = 50, 20


def promise(**changes: Any) -> ClientPrivacy:
    return ClientPrivacy(**({"epsilon": 6.0, "delta": 1e-5, "min_survivors": 12} | changes))


def engine(
    privacy: ClientPrivacy | None = None, *, rounds: int = 4, ledger: Ledger | None = None, **changes: Any
) -> Any:
    given: dict[str, Any] = {"clients": CLIENTS, "length": LENGTH} | changes
    return ClientPrivacyEngine(privacy or promise(), rounds=rounds, ledger=ledger or Ledger(), **given)


def run_round(keeper: ClientPrivacyEngine, survivors: int, updates: torch.Tensor | None = None) -> torch.Tensor:
    current = keeper.begin()
    updates = torch.zeros(survivors, keeper.length) if updates is None else updates
    return current.decode(sum(current.encode(update) for update in updates[:survivors]), survivors)


@pytest.mark.parametrize("noise", ["distributed", "local", "central"])
@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
def test_the_promise_is_kept_to_the_last_round(noise: str, mechanism: str) -> None:
    keeper = engine(promise(noise=noise, mechanism=mechanism))
    for _ in range(4):
        run_round(keeper, 12)
    spent = keeper.spent()
    assert 6.0 * (1 - client_noise.SLACK) <= spent.epsilon <= 6.0
    assert (spent.unit, spent.steps, spent.sample_rate) == ("client", 4, 1.0)
    assert "zero out one client" in spent.neighbours
    with pytest.raises(BudgetExceededError, match="planned for 4 rounds"):
        keeper.begin()


def test_noise_is_where_it_was_said_to_be() -> None:
    """Deviation of the sum of 20 over the clip: z if central, z sqrt(20 / 11) if distributed, z sqrt(20) if local."""
    for noise, factor in (("central", 1.0), ("distributed", math.sqrt(20 / 11)), ("local", math.sqrt(20))):
        keeper = engine(promise(noise=noise, clip=3.0), length=5000, rounds=2)
        sums = 20 * run_round(keeper, 20).numpy()
        # 5,000 numbers: the sample deviation is within 6 % with false alarm 2e-9.
        assert sums.std() == pytest.approx(3.0 * keeper.ratio * factor, rel=0.06), noise


def test_more_survivors_than_the_least_cost_less_and_the_ledger_says_so() -> None:
    ledger = Ledger()
    keeper = engine(ledger=ledger)
    run_round(keeper, 12)
    assert len(ledger.releases) == 1  # the least survived: nothing to settle
    run_round(keeper, 18)
    assert [release.shares for release in ledger.releases] == [11, 11, 17]
    assert ledger.releases[-1].settles
    assert keeper.spent().epsilon == ledger.epsilon(1e-5)
    full = engine()
    for _ in range(2):
        run_round(full, 12)
    assert keeper.spent().epsilon < full.spent().epsilon


def test_colluders_and_dropouts_size_the_noise() -> None:
    few, many = engine(promise(colluders=1)), engine(promise(colluders=6))
    assert (few.holders, many.holders) == (11, 6)
    assert few.ratio == pytest.approx(many.ratio, rel=0.02)  # of what the adversary does not know
    shares = [keeper.scheme.share_variance / keeper.scheme.scale**2 for keeper in (few, many)]
    assert float(shares[1] / shares[0]) == pytest.approx(11 / 6, rel=0.05)


def test_a_round_is_paid_for_before_anything_is_drawn(tmp_path: Path) -> None:
    drawn: list[int] = []
    path = tmp_path / "clients.jsonl"

    def source(count: int) -> bytes:
        drawn.append(len(Ledger(path).releases) if path.exists() else 0)
        return os_stream(count)

    keeper = engine(ledger=Ledger(path), source=source)
    current = keeper.begin()
    current.encode(torch.ones(LENGTH))
    assert drawn
    assert min(drawn) == 1


def test_a_killed_round_stays_paid_at_its_worst(tmp_path: Path) -> None:
    path = tmp_path / "clients.jsonl"
    code = f"""
import os, torch
from choral.privacy import ClientPrivacyEngine, ClientPrivacy, Ledger
keeper = ClientPrivacyEngine(ClientPrivacy(epsilon=6.0, delta=1e-5, min_survivors=12), clients=20, length=50, rounds=4,
                     ledger=Ledger({str(path)!r}))
keeper.begin().encode(torch.ones(50))
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -9
    assert [release.shares for release in Ledger(path).releases] == [11]
    with pytest.raises(BudgetExceededError, match="is spent") as caught:
        engine(ledger=Ledger(path), rounds=4)
    assert "3 more are left" in caught.value.hint
    again = engine(ledger=Ledger(path), rounds=3)
    for _ in range(3):
        run_round(again, 12)
    assert Ledger(path).epsilon(1e-5) <= 6.0
    assert again.ratio == engine(rounds=4).ratio  # the killed round is one of the four that were planned
    with pytest.raises(BudgetExceededError, match="is spent"):
        engine(ledger=Ledger(path))


def test_a_second_federation_on_the_same_ledger_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "clients.jsonl"
    first, second = engine(ledger=Ledger(path)), engine(ledger=Ledger(path))
    first.begin()
    with pytest.raises((LedgerError, BudgetExceededError)):
        second.begin()
    assert len(Ledger(path).releases) == 1


def test_ledgers_of_records_and_of_clients_do_not_mix(tmp_path: Path) -> None:
    clients, records = tmp_path / "clients.jsonl", tmp_path / "records.jsonl"
    engine(ledger=Ledger(clients)).begin()
    with pytest.raises(LedgerError, match="for each client, not for each record"):
        Privacy(epsilon=1.0, delta=1e-5, ledger=clients).spent()
    ledger = Ledger(records)
    ledger.bind("clients", 1e-5)
    from choral.privacy import PoissonSampledGaussian

    ledger.append(PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.0, steps=1), after=0)
    with pytest.raises(LedgerError, match="for each record, not for each client"):
        engine(ledger=Ledger(records))
    with pytest.raises(LedgerError, match="for each client, not for each record"):
        Ledger(clients).append(ledger.events[0], after=1)
    mixed = clients.read_bytes().splitlines()[:1] + records.read_bytes().splitlines()[1:]
    clients.write_bytes(b"\n".join(mixed) + b"\n")
    with pytest.raises(LedgerError):
        Ledger(clients)


def test_too_few_survivors_are_never_decoded() -> None:
    keeper = engine()
    current = keeper.begin()
    total = sum(current.encode(torch.zeros(LENGTH)) for _ in range(11))
    for survivors in (11, 21):
        with pytest.raises(TooFewClientsError, match="at least 12"):
            current.decode(total, survivors)


def test_a_sum_is_decoded_once() -> None:
    """Central noise drawn twice on one sum could be averaged away."""
    current = engine(promise(noise="central")).begin()
    total = sum(current.encode(torch.zeros(LENGTH)) for _ in range(12))
    current.decode(total, 12)
    with pytest.raises(PrivacyError, match="has been decoded"):
        current.decode(total, 12)


def test_the_mean_is_right_when_the_budget_is_large() -> None:
    updates = torch.randn(CLIENTS, LENGTH, generator=torch.Generator().manual_seed(1))
    clip = float(updates.norm(dim=1).median())
    clipped = updates * torch.clamp(clip / updates.norm(dim=1, keepdim=True), max=1.0)
    for privacy in (
        promise(epsilon=1e4, clip=clip, noise="distributed", bits=24),
        promise(epsilon=1e4, clip=clip, noise="central"),
        promise(epsilon=1e4, clip=AdaptiveClip(start=clip, share=0.4), noise="distributed", bits=24),
        promise(epsilon=1e4, clip=AdaptiveClip(start=clip, share=0.4), noise="central"),
    ):
        mean = run_round(engine(privacy, rounds=1), CLIENTS, updates)
        assert mean.dtype == torch.float64
        assert torch.allclose(mean.float(), clipped.mean(0), atol=0.06 * clip / 20)


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
def test_a_sum_of_few_among_a_million_has_the_noise_of_few(mechanism: str) -> None:
    """With room for a million in the modulus, the rounding alone would cost four times the noise."""
    privacy = promise(delta=1e-7, min_survivors=18, mechanism=mechanism)
    few, many = (engine(privacy, clients=clients, length=1000, most=20) for clients in (20, 1_000_000))
    assert many.scheme == few.scheme
    assert engine(privacy, clients=1_000_000, length=1000).ratio > 3 * many.ratio
    current = many.begin()
    total = sum(current.encode(torch.zeros(1000)) for _ in range(21))
    with pytest.raises(TooFewClientsError, match="21 of 20 clients"):
        current.decode(total, 21)
    for most in (17, 1_000_001):
        with pytest.raises(ConfigError, match="in one sum at most"):
            engine(privacy, clients=1_000_000, length=1000, most=most)


@pytest.mark.parametrize("noise", ["distributed", "central"])
def test_the_clip_finds_the_quantile(noise: str) -> None:
    """Norms are spread evenly over 1 to 3; the 0.3 quantile is 1.6. Start far off on either side."""
    norms = torch.linspace(1, 3, 200)
    updates = torch.nn.functional.normalize(torch.ones(200, LENGTH), dim=1) * norms[:, None]
    for start in (0.2, 20.0):
        adaptive = AdaptiveClip(start=start, quantile=0.3, rate=0.5, share=0.1)
        privacy = ClientPrivacy(epsilon=60.0, delta=1e-5, min_survivors=180, noise=noise, clip=adaptive)
        keeper = ClientPrivacyEngine(privacy, clients=200, length=LENGTH, rounds=25, ledger=Ledger())
        found = []
        for _ in range(25):
            run_round(keeper, 200, updates)
            found.append(keeper.clip)
        assert np.mean(found[-5:]) == pytest.approx(1.6, rel=0.12)


def test_adaptive_clipping_pays_for_its_count() -> None:
    """z^-2 = z_update^-2 + (2 sigma_count)^-2, measured (Andrew et al. 2021, theorem 1): nothing is free."""
    share, length = 0.2, 3000
    keeper = engine(promise(clip=AdaptiveClip(start=2.0, share=share), noise="central"), length=length, rounds=300)
    noise_of_update, counts = [], []
    for _ in range(300):
        clip = keeper.clip
        sums = 20 * run_round(keeper, 20, torch.full((20, length), 1e-9)).numpy()
        noise_of_update.append(sums.std() / clip)
        counts.append(math.log(clip / keeper.clip) / 0.2 + 0.5)
    z, z_update = keeper.ratio, float(np.mean(noise_of_update))
    sigma_count = z / (2 * math.sqrt(share))
    assert z_update == pytest.approx(z / math.sqrt(1 - share), rel=0.01)
    assert z**-2 == pytest.approx(z_update**-2 + (2 * sigma_count) ** -2, rel=0.02)
    # All 20 updates are within the clip: the count is 20, seen through noise, cut at 1. Its mean says how much noise.
    shift = sigma_count / 20 / math.sqrt(2 * math.pi)
    inside = [count for count in counts if count < 1 - 1e-9]
    assert len(inside) / 300 == pytest.approx(0.5, abs=0.16)  # 5.5 deviations
    assert np.mean(counts) == pytest.approx(max(1 - shift, 0), abs=6 * sigma_count / 20 / math.sqrt(300) + 0.15 * shift)


def test_the_clip_moves_as_published() -> None:
    adaptive = AdaptiveClip(start=1.0, quantile=0.5, rate=0.2)
    assert adaptive.moved(1.0, 0.5) == 1.0
    assert adaptive.moved(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert adaptive.moved(1.0, 0.0) == pytest.approx(math.exp(0.1))
    assert adaptive.moved(1.0, -50.0) == adaptive.moved(1.0, 0.0)  # a noisy share is a share


def test_ledgers_and_errors_show_no_update() -> None:
    keeper = engine()
    current = keeper.begin()
    for bad in (torch.full((LENGTH,), math.nan), torch.full((LENGTH,), 7.125e300, dtype=torch.float64) * math.inf):
        with pytest.raises(EncodingError) as caught:
            current.encode(bad)
        assert "7.125" not in str(caught.value)
    for bad in (torch.zeros(LENGTH - 1), torch.zeros(LENGTH, dtype=torch.int64), torch.zeros(5, 10)):
        with pytest.raises(EncodingError, match="expected \\(50,\\)"):
            current.encode(bad)
    assert current.encode(torch.zeros(LENGTH, dtype=torch.bfloat16)).dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"clip": 0.0}, "clipping norm"),
        ({"clip": -1.0}, "clipping norm"),
        ({"clip": math.nan}, "clipping norm"),
        ({"bits": 30}, "bits"),
        ({"noise": "everywhere"}, "noise is"),
        ({"mechanism": "laplace"}, "mechanism is"),
        ({"colluders": -1}, "colluders"),
        ({"min_survivors": 1}, "above the 1 colluders"),
        ({"min_survivors": 3, "colluders": 3}, "above the 3 colluders"),
    ],
    ids=str,
)
def test_promises_out_of_range(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        promise(**changes)


@pytest.mark.parametrize("changes", [{"start": 0.0}, {"quantile": 1.0}, {"share": 0.0}, {"rate": -1.0}], ids=str)
def test_adaptive_clips_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdaptiveClip(**changes)


def test_promises_that_a_federation_cannot_keep() -> None:
    with pytest.raises(ConfigError, match="below 1/n"):
        engine(promise(delta=0.05))
    with pytest.raises(ConfigError, match="min_survivors is 12 of 11"):
        engine(clients=11)
    with pytest.raises(ConfigError, match="expected rounds >= 0"):
        engine(rounds=-1)
    with pytest.raises(ConfigError, match="4 bits are too few"):
        engine(promise(bits=4), clients=1000)
    with pytest.raises(BudgetExceededError, match="no amount of noise"):
        engine(promise(bits=10, epsilon=0.5, mechanism="skellam"), length=1 << 18, rounds=50)
    assert engine(promise(min_survivors=None)).min_survivors == 11


def test_where_no_round_is_to_come_none_begins_and_the_encoding_is_that_of_the_plan() -> None:
    """A run that is over is opened again, to be evaluated or read, though no filter would admit one round more."""
    ledger = Ledger()
    planned = engine(ledger=ledger, rounds=2)
    for _ in range(2):
        planned.begin()
    again = engine(ledger=ledger, rounds=0)
    assert again.encoding == planned.encoding
    with pytest.raises(BudgetExceededError, match="planned for 0 rounds"):
        again.begin()
    assert len(ledger.releases) == 2


def test_clients_that_encode_differently_do_not_agree() -> None:
    texts = {engine(privacy).encoding for privacy in (promise(), promise(bits=16), promise(mechanism="skellam"))}
    assert len(texts) == 3
    assert all(len(text) <= 255 for text in texts)
