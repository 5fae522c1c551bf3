"""A party's part of banded correlated noise in shares: its law, its rows, its batches, and what it refuses."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import toeplitz
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.privacy import BandedPlan, BandedShares, CorrelatedPrivacy, Ledger, PrivacyError, SharesParty, SharesTerms
from choral.privacy.accounting.matrix_strategies import Banded
from choral.privacy.correlated.noise_streams import stream
from choral.privacy.record_shares.fixed_batches import FixedBatch, NoiseRows, batch_of_step
from choral.privacy.record_shares.plan import plan_shares

Floats = npt.NDArray[np.float64]
PROMISE = CorrelatedPrivacy(2.0, 1e-4, mechanism="banded", bands=4, noise="distributed")
COLUMN = (1.0, 0.6, 0.4, 0.3)
BEYOND = 5.3  # deviations: 1.2e-7 for one two-sided test; seeds are fixed, so that it never fails by chance


def terms(**changes: Any) -> SharesTerms:
    settings: dict[str, Any] = {
        "records": 36,
        "batch_size": 6,
        "steps": 24,
        "parties": 4,
        "min_survivors": 4,
        "length": 1000,
        "most_records": 13,
    }
    return SharesTerms(**settings | changes)


def plan_of(**changes: Any) -> BandedPlan:
    plan = plan_shares(PROMISE, terms(**changes))
    assert isinstance(plan, BandedPlan)
    return plan


class Nothing(nn.Module):
    """A model whose gradients are zero, so that a vector is noise alone; `seen` is called with each batch."""

    def __init__(self, length: int, seen: Callable[[list[int]], None] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, length, bias=False)
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, 1:]).sum(dim=1)


class Party:
    """A party that makes steps; records say where they stand, and their other feature is zero."""

    def __init__(self, plan: BandedPlan, name: str, *, seed: int, ledger: Ledger | None = None, count: int = 9) -> None:
        self.ledger = Ledger() if ledger is None else ledger
        self.party = SharesParty(
            PROMISE, plan, holder=name, ledger=self.ledger, source=np.random.default_rng(seed).bytes
        )
        rows = torch.stack([torch.arange(float(count)), torch.zeros(count)], dim=1)
        self.model, self.optimizer, self.loader = self.party.wrap(
            Nothing(plan.terms.length), DataLoader(TensorDataset(rows))
        )

    def step(self) -> tuple[npt.NDArray[np.int64], list[int]]:
        """The vector of the next step, and which records are in it."""
        records: list[int] = []
        for (x,) in self.loader:
            taken = self.optimizer.taken[self.optimizer._shown - len(x) : self.optimizer._shown]
            records += x[taken, 0].long().tolist()
            self.optimizer.zero_grad()
            self.model(x).mean().backward()
            self.optimizer.step()
        return self.party.take(), records

    def made(self, row: int) -> npt.NDArray[np.int64]:
        self.party.at(row)
        return self.step()[0]


def events_of(ledger: Ledger) -> list[BandedShares]:
    return [event for event in ledger.events if isinstance(event, BandedShares)]


def opened(plan: BandedPlan, parties: int, rows: int, make: Callable[[int], Party]) -> Floats:
    """The sums of `rows` rows, of noise alone, in deviations of one party's z. Shape (rows, length)."""
    made = [make(number) for number in range(parties)]
    sums = [np.sum([party.made(row) for party in made], axis=0) for row in range(rows)]
    return np.stack(sums) * 2.0**-plan.grid.coarse / plan.share


def whiteness(white: Floats, variance: float) -> float:
    """The largest of the tests that rows are independent and of one variance, in deviations of each.

    The variance of all, and the correlation of each two rows; rounding adds at most 1/(12 * 64) of a share's.
    """
    rows, length = white.shape
    scaled = white / np.sqrt(variance)
    found = [abs(float((scaled**2).mean()) - 1.0) / np.sqrt(2.0 / (rows * length))]
    for lag in range(1, rows):
        found.append(abs(float((scaled[lag:] * scaled[:-lag]).mean())) * np.sqrt((rows - lag) * length))
    return max(found)


def test_the_sum_of_all_shares_has_the_law_of_one_banded_mechanism() -> None:
    """C times the opened sums is white, of variance h s^2: 12 rows of 1,000 coordinates, three parties, real vectors.

    False alarms: 12 tests at 1.2e-7, were seeds drawn; rounding is .16 deviations. White noise, C of other bands and
    noise of two parties for three are all refuted.
    """
    plan = plan_of()
    sums = opened(plan, 3, 12, lambda number: Party(plan, f"party {number}", seed=10 + number))
    column = np.r_[plan.coefficients, np.zeros(8)]
    c = toeplitz(column, np.zeros(12))
    assert whiteness(c @ sums, 3.0) < BEYOND
    assert whiteness(sums, 3.0) > 4 * BEYOND  # they are not white themselves
    assert whiteness(c @ sums, 2.0) > 4 * BEYOND
    shorter = toeplitz(np.r_[plan.coefficients[:3], np.zeros(9)], np.zeros(12))
    assert whiteness(shorter @ sums, 3.0) > 2 * BEYOND
    white = np.random.default_rng(1).normal(size=(12, 1000)) * np.sqrt(3.0)
    assert whiteness(c @ white, 3.0) > 4 * BEYOND


def test_it_is_that_of_the_mechanism_of_one_data_owner() -> None:
    """Every covariance of two rows against that of the centralised stream of the same C, both over 1,000 coordinates.

    78 differences, each a mean of 1,000 products; 5.3 deviations of it, by the covariances that C says.
    """
    plan, rows = plan_of(), 12
    sums = opened(plan, 3, rows, lambda number: Party(plan, f"party {number}", seed=20 + number)) / np.sqrt(3.0)
    source, central = np.random.default_rng(5).bytes, stream(Banded(plan.coefficients))
    owner = np.stack([central.next(1000, 2.0**12, source) for _ in range(rows)]) * 2.0**-12
    c = toeplitz(np.r_[plan.coefficients, np.zeros(rows - 4)], np.zeros(rows))
    true = np.linalg.inv(c) @ np.linalg.inv(c).T
    deviation = np.sqrt(2.0 * (np.outer(np.diag(true), np.diag(true)) + true**2) / 1000)
    found = np.abs(sums @ sums.T - owner @ owner.T) / 1000 / deviation
    assert float(found.max()) < BEYOND
    plain = np.random.default_rng(6).normal(size=(rows, 1000))
    assert float((np.abs(plain @ plain.T - owner @ owner.T) / 1000 / deviation).max()) > 2 * BEYOND


def rows_of(told: list[int], count: int = 4000, seed: int = 3) -> Floats:
    noise, source = NoiseRows(COLUMN), np.random.default_rng(seed).bytes
    made = []
    for row in told:
        noise.at(row)
        made.append(noise.next(count, source).copy())
    return np.stack(made)


def test_after_a_row_that_it_missed_a_party_takes_nothing_back() -> None:
    """Rows 0 to 3, then 5 to 8: two stretches, each C^-1 of its own z; nothing of the one is in the other."""
    made = rows_of([0, 1, 2, 3, 5, 6, 7, 8])
    c = toeplitz(COLUMN, np.zeros(4))
    white = np.concatenate([c @ made[:4], c @ made[4:]])
    assert whiteness(white, 1.0) < BEYOND
    through = toeplitz(np.r_[COLUMN, np.zeros(4)], np.zeros(8))
    assert whiteness(through @ made, 1.0) > 2 * BEYOND
    assert whiteness(through @ rows_of(list(range(8))), 1.0) < BEYOND


def test_rows_are_exactly_the_recursion() -> None:
    """From the same z: C times the rows is z, to the rounding of float64."""
    made = rows_of(list(range(7)), count=50)
    z = rows_of([0, 2, 4, 6, 8, 10, 12], count=50)  # each begins anew, and so is its z
    c = toeplitz(np.r_[COLUMN, np.zeros(3)], np.zeros(7))
    np.testing.assert_allclose(c @ made, z, atol=1e-13)


def test_a_row_that_was_made_is_never_made_again() -> None:
    """A server that asks again, for the same row or an earlier one, gets nothing, and nothing is charged."""
    here = Party(plan_of(), "north", seed=1)
    first = here.made(4)
    for row in (4, 3, 0):
        with pytest.raises(PrivacyError, match=f"row {row} of the noise is asked for, and row 4 was made before"):
            here.party.at(row)
        with pytest.raises(PrivacyError, match="nothing said which row"):
            here.step()
    assert len(here.ledger.events) == 1
    with pytest.raises(PrivacyError, match="no step was made"):
        here.party.take()
    assert not np.array_equal(first, here.made(5))
    for row in (-1, 1.0, True, None):
        with pytest.raises(PrivacyError, match="expected an integer"):
            here.party.at(row)  # type: ignore[arg-type]


def test_nor_by_a_process_that_begins_again_on_its_ledger() -> None:
    """It forgot its noise, and its ledger tells which rows were made: whoever begins numbers anew gets nothing."""
    plan, ledger = plan_of(), Ledger()
    Party(plan, "north", seed=1, ledger=ledger).made(7)
    again = Party(plan, "north", seed=2, ledger=ledger)
    assert again.party.last_row == 7
    with pytest.raises(PrivacyError, match="row 7 of the noise is asked for, and row 7 was made before"):
        again.party.at(7)
    first = again.made(8)
    alone = Party(plan, "north", seed=2).made(8)
    assert np.array_equal(first, alone)  # nothing was taken back


def test_without_a_row_nothing_is_computed_or_paid_for() -> None:
    here = Party(plan_of(), "north", seed=1)
    with pytest.raises(PrivacyError, match="nothing said which row of all parties' sums"):
        here.step()
    here.made(0)
    with pytest.raises(PrivacyError, match="nothing said which row of all parties' sums"):
        here.step()
    assert len(here.ledger.events) == 1


def test_a_row_of_which_nothing_was_made_may_be_told_again() -> None:
    here = Party(plan_of(), "north", seed=1)
    here.party.at(0)
    here.party.at(1)
    here.made(2)
    assert [(event.number, event.row) for event in events_of(here.ledger)] == [(1, 2)]
    with pytest.raises(PrivacyError, match="row 2 was made before"):
        here.party.at(1)


def test_each_record_takes_part_once_in_as_many_steps_as_batches_whatever_is_missed_or_begun_again() -> None:
    """24 steps of a plan with six batches, three processes, rows with gaps: by structure, not by luck."""
    plan, ledger = plan_of(length=3), Ledger()
    taken: list[list[int]] = []
    row = 0
    for process, steps in enumerate((5, 9, 10)):
        here = Party(plan, "north", seed=process, ledger=ledger, count=13)
        for _ in range(steps):
            row += 1 + row % 3
            here.party.at(row)
            taken.append(here.step()[1])
    assert [event.number for event in events_of(ledger)] == list(range(1, 25))
    assert [event.row for event in events_of(ledger)] == sorted({event.row for event in events_of(ledger)})
    for first in range(24 - 5):
        together = list(itertools.chain.from_iterable(taken[first : first + 6]))
        assert sorted(together) == list(range(13))
    assert taken[:18] == taken[6:]
    with pytest.raises(Exception, match="24 steps, tried ones included, and all are used"):
        here.made(row + 1)


def test_a_batch_is_of_one_step_alone() -> None:
    """Of two passes by turns, over two loaders, the second may not be of records whose turn was before."""
    here = Party(plan_of(length=3), "north", seed=1)
    data = DataLoader(TensorDataset(torch.stack([torch.arange(9.0), torch.zeros(9)], dim=1)))
    model, optimizer, loader = here.party.wrap(Nothing(3), data)
    here.party.at(0)
    first, other = iter(loader), iter(here.loader)
    (x,), _ = next(first), next(other)
    model(x).mean().backward()
    optimizer.step()
    here.party.at(1)
    here.model(x).mean().backward()
    with pytest.raises(PrivacyError, match="another step"):
        here.optimizer.step()
    assert len(here.ledger.events) == 1


@pytest.mark.parametrize("padded", [True, False])
def test_rows_beyond_the_batch_weigh_nothing_and_are_as_many_in_each_step(padded: bool) -> None:
    for number in range(12):
        sampler = FixedBatch(13, 6, 3, holder="a", padded=padded, number=lambda number=number: number)
        (places,) = list(sampler)
        inside = [place for place, taken in zip(places, sampler.taken, strict=True) if taken]
        assert inside == batch_of_step(13, 6, sampler.first, number).tolist()
        assert len(places) == (3 if padded else len(inside))


def test_small_parties_are_spread_over_the_steps_by_their_names() -> None:
    firsts = [FixedBatch(1, 10, 1, holder=f"p{k}", padded=True, number=lambda: 0).first for k in range(1000)]
    counts = np.bincount(firsts, minlength=10)
    assert float(((counts - 100.0) ** 2 / 100.0).sum()) < 50.0  # chi-square of nine degrees; the names are fixed


def test_no_record_of_a_step_of_nobody() -> None:
    """A party of one record: in five of six steps its vector is noise, computed and paid for as any."""
    here = Party(plan_of(length=3), "north", seed=2, count=1)
    taken = []
    for row in range(6):
        here.party.at(row)
        taken.append(here.step()[1])
    assert sorted(map(len, taken)) == [0, 0, 0, 0, 0, 1]
    assert len(here.ledger.events) == 6


def test_earlier_noise_is_neither_shown_nor_written_down() -> None:
    here = Party(plan_of(length=3), "north", seed=1)
    here.made(0)
    assert repr(here.party._noise) == "NoiseRows(bands=4, last=0)"
    with pytest.raises(PrivacyError, match="neither copied"):
        pickle.dumps(here.party)


def test_a_total_of_all_records_is_no_row_of_fixed_batches() -> None:
    plan = plan_of(length=3)
    party = SharesParty(PROMISE, plan, holder="north", ledger=Ledger())
    with pytest.raises(PrivacyError, match="a total is of all of them"):
        party.add(np.zeros(3))


def test_a_row_of_another_length_is_refused() -> None:
    noise, source = NoiseRows(COLUMN), np.random.default_rng(1).bytes
    noise.at(0)
    noise.next(3, source)
    noise.at(1)
    with pytest.raises(PrivacyError, match="so far is for 3 numbers, now there are 4"):
        noise.next(4, source)
