"""Broken noise in shares, one line made wrong each, is caught from the opened sums alone; the honest one is not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Crypto.Cipher import AES

from choral.audits.attacks import probing_shares
from choral.audits.attacks.probing_shares import probe_shares
from choral.audits.probes.noise_checks import noise_law
from choral.audits.probes.records import ProbeLayout
from choral.errors import ConfigError
from choral.privacy import CorrelatedPrivacy, Ledger, Privacy, SharesParty, SharesPlan
from choral.privacy.record_shares import fixed_batches
from choral.privacy.record_shares import party as party_module
from choral.privacy.record_shares.fixed_batches import NoiseRows
from choral.privacy.record_shares.party import ShareOptimizer

PROMISE = Privacy(epsilon=2.0, delta=1e-5, max_grad_norm=0.7, noise="distributed", colluders=1)
PARTIES, SURVIVORS = 10, 9  # so that eight are honest


def test_the_honest_steps_pass() -> None:
    """Each check fails honest steps once in a million; the canaries once in twenty, and so are not looked at."""
    found = probe_shares(PROMISE, parties=PARTIES, min_survivors=SURVIVORS)
    assert not any(check.violated for check in found.checks)
    noise = found.checks[0]
    assert noise.observed == pytest.approx(noise.expected, rel=0.03)
    assert found.canaries.attack == "gradients of probe records in every step"


def scaled(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest = party_module.noisy_share

        def less(value: Any, clip: float, share: float, *rest: Any) -> Any:
            return honest(value, clip, factor * share, *rest)

        monkeypatch.setattr(party_module, "noisy_share", less)

    return broken


def noise_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(count: int) -> bytes:
        return bytes(AES.new(bytes(32), AES.MODE_CTR, nonce=b"").encrypt(bytes(count)))

    honest = party_module.noisy_share
    monkeypatch.setattr(party_module, "noisy_share", lambda *given: honest(*given[:-1], seeded))


def padding_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill a step up are a record drawn many times over."""
    monkeypatch.setattr(ShareOptimizer, "_are_drawn", lambda _, rows: rows | True)


def drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = party_module.poisson_sample

    def more(size: int, rate: Any, source: Any) -> Any:
        return np.union1d(honest(size, rate, source), honest(size, rate, source))

    monkeypatch.setattr(party_module, "poisson_sample", more)


def batches_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(party_module, "poisson_sample", lambda size, rate, _: np.arange(round(size * rate)))


@pytest.mark.parametrize(
    ("broken", "check", "part"),
    [
        (scaled((8 / 10) ** 0.5), "Noise is as large as claimed", 8 / 10),  # sized for all parties
        (scaled((8 / 9) ** 0.5), "Noise is as large as claimed", 8 / 9),  # no margin for the colluder
        (noise_seeded, "Noise is never used twice", None),
        (padding_counted, "Every record is clipped", None),
        (drawn_twice, "Records are drawn at the claimed rate", None),
        (batches_of_fixed_size, "Batch sizes vary as Poisson samples do", None),
    ],
)
@pytest.mark.usefixtures("looked_at_once")
def test_what_is_wrong_in_every_party_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], check: str, part: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    found = probe_shares(PROMISE, parties=PARTIES, min_survivors=SURVIVORS)
    assert check in [each.name for each in found.checks if each.violated]
    assert found.violated
    if part is not None:
        noise = found.checks[0]
        assert (noise.observed / noise.expected) ** 2 == pytest.approx(part, rel=0.04)


@pytest.mark.usefixtures("looked_at_once")
def test_one_party_that_adds_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among eight honest ones; the others', and what the colluder adds, do not hide it."""
    honest, silent = party_module.noisy_share, []

    def make(privacy: Privacy, plan: SharesPlan, name: str, ledger: Ledger) -> SharesParty:
        party = SharesParty(privacy, plan, holder=name, ledger=ledger)
        if name == "probe 3":
            silent.append(party._source)
            party._source = none_of_it
        return party

    def none_of_it(count: int) -> bytes:
        return silent[0](count)

    def quiet(value: Any, clip: float, share: float, grid: Any, rows: int, source: Any) -> Any:
        return honest(value, clip, share * (1e-6 if source is none_of_it else 1.0), grid, rows, source)

    monkeypatch.setattr(party_module, "noisy_share", quiet)
    found = probe_shares(PROMISE, parties=PARTIES, min_survivors=SURVIVORS, make=make)
    noise = found.checks[0]
    assert noise.violated
    assert (noise.observed / noise.expected) ** 2 == pytest.approx(7 / 8, rel=0.04)


@pytest.mark.usefixtures("looked_at_once")
def test_what_colluders_add_is_not_counted_as_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A colluder that adds ten times its share hides nothing: its vector is subtracted."""
    honest, sources = party_module.noisy_share, []

    def make(privacy: Privacy, plan: SharesPlan, name: str, ledger: Ledger) -> SharesParty:
        party = SharesParty(privacy, plan, holder=name, ledger=ledger)
        if name == f"probe {SURVIVORS - 1}":
            drawn = party._source
            party._source = lambda count: drawn(count)
            sources.append(party._source)
        return party

    def loud(value: Any, clip: float, share: float, grid: Any, rows: int, source: Any) -> Any:
        colluder = bool(sources) and any(source is each for each in sources)
        return honest(value, clip, share * (10.0 if colluder else (8 / 9) ** 0.5), grid, rows, source)

    monkeypatch.setattr(party_module, "noisy_share", loud)
    found = probe_shares(PROMISE, parties=PARTIES, min_survivors=SURVIVORS, make=make)
    assert found.checks[0].violated


BANDED = CorrelatedPrivacy(
    epsilon=2.0, delta=1e-5, max_grad_norm=0.7, mechanism="banded", noise="distributed", colluders=1
)


def of_white_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row begins anew: the noise of no step is taken back, and C makes too much of it."""
    honest = NoiseRows.next

    def anew(self: NoiseRows, count: int, source: Any) -> Any:
        self._past.clear()
        return honest(self, count, source)

    monkeypatch.setattr(NoiseRows, "next", anew)


def shared_out(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        honest = party_module.share_with

        def less(value: Any, clip: float, share: float, *rest: Any) -> Any:
            return honest(value, clip, factor * share, *rest)

        monkeypatch.setattr(party_module, "share_with", less)

    return broken


def always_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fixed_batches.batch_of_step
    monkeypatch.setattr(fixed_batches, "batch_of_step", lambda size, m, first, number: honest(size, m, first, 0))


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., SharesParty]:
    """Coins, signs and noise of fixed seeds: what is found is found each time. How to make a party.

    The two trainings of a probe are copies of one process, and would draw the same; a file tells them apart.
    """
    numbers, turn = itertools.count(), list[int]()

    def seed() -> tuple[int, int]:
        if not turn:
            try:
                os.close(os.open(tmp_path / "first", os.O_CREAT | os.O_EXCL))
                turn.append(0)
            except FileExistsError:
                turn.append(1)
        return turn[0], next(numbers)

    def coins(count: int) -> Any:
        return np.random.default_rng(seed()).random(count) < 0.5

    def layout(count: int) -> ProbeLayout:
        return ProbeLayout(count, np.random.default_rng(seed()).choice([-1.0, 1.0], count))

    def make(privacy: Privacy, plan: SharesPlan, name: str, ledger: Ledger) -> SharesParty:
        return SharesParty(privacy, plan, holder=name, ledger=ledger, source=np.random.default_rng(seed()).bytes)

    monkeypatch.setattr(probing_shares, "flip_coins", coins)
    monkeypatch.setattr(probing_shares.ProbeLayout, "of", layout)
    return make


@pytest.mark.usefixtures("looked_at_once")
def test_the_honest_steps_of_banded_noise_pass(seeded: Callable[..., SharesParty]) -> None:
    """Three of four survive, and two are honest."""
    found = probe_shares(BANDED, parties=4, min_survivors=3, make=seeded)
    assert not any(check.violated for check in found.checks), found.sentence
    noise = found.checks[0]
    assert noise.observed == pytest.approx(noise.expected, rel=0.03)


@pytest.mark.parametrize(
    ("broken", "check", "part"),
    [
        pytest.param(
            shared_out((2 / 4) ** 0.5), "Noise is as large as claimed", 2 / 4, marks=pytest.mark.slow
        ),  # sized for all parties
        (shared_out((2 / 3) ** 0.5), "Noise is as large as claimed", 2 / 3),  # no margin for the colluder
        (of_white_noise, "Noise is never used twice", None),  # C mixes neighbouring steps' into one
        (always_the_first_batch, "Each record takes part once a pass, in the same step", None),
    ],
)
@pytest.mark.usefixtures("looked_at_once")
def test_what_is_wrong_with_banded_noise_is_found(
    broken: Callable[[pytest.MonkeyPatch], None],
    check: str,
    part: float | None,
    monkeypatch: pytest.MonkeyPatch,
    seeded: Callable[..., SharesParty],
) -> None:
    broken(monkeypatch)
    found = probe_shares(BANDED, parties=4, min_survivors=3, make=seeded)
    assert check in [each.name for each in found.checks if each.violated], found.sentence
    if part is not None:
        noise = found.checks[0]
        assert (noise.observed / noise.expected) ** 2 == pytest.approx(part, rel=0.04)


def test_other_promises_have_another_probe() -> None:
    with pytest.raises(ConfigError, match="noise that each party adds for itself"):
        probe_shares(Privacy(2.0, 1e-5), parties=3, min_survivors=3)
    with pytest.raises(ConfigError, match="expected at least 2"):
        probe_shares(PROMISE, parties=3, min_survivors=1)


@pytest.mark.parametrize("per_step", [8.0, 11.3, 16.0])
def test_a_rounded_gaussian_is_one_on_its_grid_and_rounded_heavy_tails_are_not(per_step: float) -> None:
    """A share's deviation is 8 to 16 steps. Half a step is up to 2.5 % of the law, which 24,000 coordinates tell."""
    random = np.random.default_rng(4)
    rounded = np.rint(per_step * random.standard_normal((12, 40_000))) / per_step
    assert not noise_law(rounded, 1.0 / per_step).violated
    assert noise_law(rounded).violated or per_step == 16.0
    heavy = np.rint(per_step * random.standard_t(9, (12, 2_000))) / per_step
    assert noise_law(heavy, 1.0 / per_step).violated
    even = np.rint(per_step * 12**0.5 * random.uniform(-0.5, 0.5, (12, 2_000))) / per_step
    assert noise_law(even, 1.0 / per_step).violated
