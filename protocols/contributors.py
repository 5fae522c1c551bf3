"""A sum that publishes no coordinate to which fewer than t parties contribute: two sums, of which the first counts.

    parties: first sum     1 where the vector is not zero, 0 where it is      counts, mod 2^b, b = bits of n
    all:     opened        how many parties contribute to each coordinate     a release of its own, exact
    parties: second sum    the vector, 0 where a count is from 1 to t - 1     what is published

A sum hides nothing where one party alone is not zero: there it *is* that party's value. The parties leave such
coordinates out themselves, before anything of them is sent.

**What is guaranteed**, beside what the sum itself promises: every coordinate that is published is the sum of at least t
parties' values, of whom those that do not collude with the server are at least t less its colluders; t is at least
corrupt + 2, so that two of them are left. The second sum is opened over exactly the parties that were counted, or not
at all: otherwise whoever chooses who drops out would choose what is left of a count.

**What is not**: the counts are known to everybody. A party that lies in the first sum, by contributing to everything,
raises counts: hence the colluders above. A value that is not zero but the same for all, such as the decay of a weight,
counts as a contribution although no data are in it: whoever trains has to see to it that untouched means zero.

For rehearsals in one process: at sites of their own parties refuse it.
Reference: per-element thresholds in secure aggregation, arXiv 2508.04285.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from choral.protocols.driver import Agreed, NeedsVector, RoundTerms
from choral.protocols.errors import SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import IntVector, Step, SumResult, SumRound, SumSession, SumSpec
from choral.protocols.own_vector import checked, is_tensor

if TYPE_CHECKING:
    import torch

Opener = Callable[[SumSpec], SumSession]


@dataclass
class ContributorCount:
    """Of a round's sums, where one process plays all parties: what a sum of theirs hides nothing of.

    Over all coordinates: moved: to which somebody contributes. one: one party alone; few: fewer than ``least``.
    shown_one, shown_few: those of them that are not zero in the sum that was opened.
    """

    least: int
    moved: int = 0
    one: int = 0
    few: int = 0
    shown_one: int = 0
    shown_few: int = 0
    _counts: IntVector | None = field(default=None, repr=False)

    def add(self, vector: Any) -> None:
        """One party's vector, of numpy or torch, as it sends it, its weight left out."""
        plain: IntVector = vector.cpu().numpy() if is_tensor(vector) else np.array(vector)
        found = (plain[:-1] != 0).astype(np.int64)
        self._counts = found if self._counts is None else self._counts + found

    def end(self, total: IntVector) -> None:
        """The sum was opened. Raises: nothing; without a vector there is nothing to count."""
        counts, self._counts = self._counts, None
        if counts is None:
            return
        shown = np.asarray(total)[:-1] != 0
        few = (counts > 0) & (counts < self.least)
        self.moved += int((counts > 0).sum())
        self.one += int((counts == 1).sum())
        self.few += int(few.sum())
        self.shown_one += int((shown & (counts == 1)).sum())
        self.shown_few += int((shown & few).sum())

    def record(self) -> dict[str, int]:
        """For the run's history."""
        return {name: getattr(self, name) for name in ("least", "moved", "one", "few", "shown_one", "shown_few")}


class ContributorSession:
    """See :class:`choral.protocols.interface.SumSession`. counting, adding: open the two sums, for a spec."""

    def __init__(self, spec: SumSpec, least: int, *, corrupt: int, counting: Opener, adding: Opener) -> None:
        """Raises: SpecError for fewer than corrupt + 2 contributors, more than parties, or a sum that may wrap."""
        if not corrupt + 2 <= least <= len(spec.parties):
            raise SpecError(
                f"contributors is {least} of {len(spec.parties)} parties, of whom {corrupt} may be corrupt; expected"
                f" {corrupt + 2} to {len(spec.parties)}",
                hint="corrupt parties may say that they contribute to everything; fewer of them (corrupt) need fewer",
            )
        if spec.bits is not None:
            raise SpecError(
                "contributors of a sum with noise: noise is not zero anywhere",
                hint="leave contributors out: whether one party contributes is what client-level noise hides",
            )
        self.spec, self.least, self.number = spec, least, 0
        self._adding = adding
        bits = len(spec.parties).bit_length()
        self.counting = counting(
            replace(spec, bound=1, weight_bound=None, bits=bits, encoding=f"contributors of {spec.encoding}"[:255])
        )
        self.adding = adding(spec)
        self._latest: SumSession = self.adding

    @property
    def statement(self) -> Mapping[str, Any]:
        """The second sum's, with the fewest parties of the first: a round over fewer than all is possible."""
        least = self.counting.statement["min_survivors"]
        trust = (
            f"{self.adding.statement.get('trust', '')} Coordinates to which fewer than {self.least} parties contribute"
        )
        return {
            **self.adding.statement,
            "min_survivors": least,
            "contributors": self.least,
            "trust": f"{trust} are left out by the parties; how many contribute to each is known to all.",
        }

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> SumRound:
        """Both sums of a round. lost: as in the interface; who drops out once its vector counts ends the round."""
        self.number += 1
        return _ContributorRound(self, lost, terms)

    def over(self, parties: tuple[str, ...]) -> SumSession:
        """The second sum over those who were counted. Raises: TooFewSurvivorsError where there is none over so few."""
        if parties == self.spec.parties:
            self._latest = self.adding
            return self.adding
        try:
            self._latest = self._adding(replace(self.spec, parties=parties, directory=self.spec.population))
        except SpecError as error:  # no threshold withstands that many corrupt ones among so few
            raise TooFewSurvivorsError(
                f"no sum over the {len(parties)} parties that were counted: {error}",
                survivors=len(parties),
                needed=len(self.spec.parties),
            ) from None
        return self._latest

    def agreed(self, party: str) -> Agreed | None:
        """Of the second sum."""
        return self._latest.agreed(party) if party in getattr(self._latest, "parties", ()) else None


class _ContributorRound:
    """See :class:`choral.protocols.interface.SumRound`. Every party keeps its vector until all are counted."""

    def __init__(self, session: ContributorSession, lost: Mapping[str, Step] | None, terms: RoundTerms | None) -> None:
        self._session, self._terms, self._number = session, terms, session.number
        self._counting = session.counting.begin(lost, terms)
        self._late = {party for party, step in (lost or {}).items() if step in ("confirmation", "unmasking")}
        self._vectors: dict[str, IntVector] = {}
        self.left_out = 0

    def needs(self, party: str) -> NeedsVector | None:
        """What all parties signed for the first sum, and sign again for the second."""
        return self._counting.needs(party)

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Have the party say where its vector is not zero. Raises: as the first sum; InputError for the vector."""
        if self._number != self._session.number:
            raise StateUsedError("this round ended when the next one began")
        spec = self._session.spec
        values = checked(vector, spec.length, spec.bound, spec.weight_bound)
        plain: IntVector = values.cpu().numpy() if is_tensor(values) else np.array(values)
        self._counting.submit(party, (plain != 0).astype(np.int64))
        self._vectors[party] = plain

    def finish(self) -> SumResult:
        """Open the counts, then the sum of what is left. Raises: TooFewSurvivorsError."""
        session = self._session
        counted = self._counting.finish()
        if gone := [party for party in counted.survivors if party in self._late]:
            raise TooFewSurvivorsError(
                f"{len(gone)} of the parties that were counted have dropped out before they sent their vectors",
                survivors=len(counted.survivors) - len(gone),
                needed=len(counted.survivors),
                missing=tuple(gone),
                hint="a sum over others than were counted is not opened: the next round counts anew",
            )
        counts = np.asarray(counted.total) & ((1 << len(session.spec.parties).bit_length()) - 1)
        dropped = (counts > 0) & (counts < session.least)
        self.left_out = int(dropped.sum())
        adding = session.over(counted.survivors).begin(None, self._terms)
        for party in counted.survivors:
            adding.submit(party, np.where(dropped, 0, self._vectors.pop(party)))
        added = adding.finish()
        return SumResult(
            total=added.total,
            survivors=added.survivors,
            bytes_up=_both(counted.bytes_up, added.bytes_up),
            bytes_down=_both(counted.bytes_down, added.bytes_down),
        )


def _both(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {party: count + second.get(party, 0) for party, count in first.items()}
