"""A sum that publishes no coordinate to which fewer than t parties contribute: two sums, of which the first counts.

    parties: first sum     1 where the vector is not zero, 0 where it is      counts, k to a word, in base n + 1
    all:     opened        how many parties contribute to each coordinate     a release of its own, exact
    server:  to parties    which coordinates are left, a bit for each
    parties: second sum    the vector at those with t contributors or more    what is published

A sum hides nothing where one party alone is not zero: there it *is* that party's value. The parties leave such
coordinates out themselves, before anything of them is sent. Nor do they send what nobody contributes to, which is zero:
where that saves more than new keys cost, the second sum is of what is left, and its parties sign which that is.

**What is guaranteed**, beside what the sum itself promises: every coordinate that is published is the sum of at least t
parties' values, of whom those that do not collude with the server are at least t less its colluders; t is at least
corrupt + 2, so that two of them are left. The second sum is opened over exactly the parties that were counted, or not
at all: otherwise whoever chooses who drops out would choose what is left of a count.

**What is not**: the counts are known to everybody. Colluders that say they contribute to everything raise counts: hence
they are taken off above. That they send 0 or 1 is taken on trust, and so are the counts that the server opens: no party
can tell either from what it sees. A value that is not zero but the same for all, such as the decay of a weight, counts
as a contribution although no data are in it: whoever trains has to see to it that untouched means zero.

**Blocks.** Coordinates that are touched together, such as the rows of an embedding, may be counted together, `block` in
a row. A party is counted in a block only where *all* its coordinates there are not zero; a block that it touches in
part it leaves out itself. So what is published has t contributors in every coordinate, as before.

**What a count costs**: k counts of n parties fill a word of ceil(k log2(n + 1)) bits, at best log2(n + 1) bits each. A
sum cannot take less. Masks hide a message only if it is uniform in a group G; all parties say "not zero" by the same
g in G, or one party's sum would tell whose it is; c of them add up to c g, and 0, g, ..., n g are all different only if
G has n + 1 elements or more. Even to tell 1 to t - 1 parties from none takes t elements, where g, ..., (t - 1) g are
not 0.

For rehearsals in one process: at sites of their own parties refuse it.
Reference: per-element thresholds in secure aggregation, arXiv 2508.04285.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from choral.protocols.driver import Agreed, NeedsVector, RoundTerms
from choral.protocols.errors import SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import IntVector, Step, SumResult, SumRound, SumSession, SumSpec
from choral.protocols.own_vector import checked, is_tensor

if TYPE_CHECKING:
    import torch

Opener = Callable[[SumSpec], SumSession]
_KEYS = 200  # bytes that a party sends for each other one to open a sum and have a first round of it, about


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
    """See :class:`choral.protocols.interface.SumSession`. counting, adding: open the two sums, for a spec. block: how
    many coordinates are counted together, all but a weight.
    """

    def __init__(
        self, spec: SumSpec, least: int, *, corrupt: int, counting: Opener, adding: Opener, block: int = 1
    ) -> None:
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
                hint="leave contributors out: all coordinates are published whatever the data are, each with noise for"
                " a whole vector, so which are published tells nothing, and costs no delta",
            )
        self.spec, self.least, self.number = spec, least, 0
        self.blocks = Blocks(spec.length, block, alone=int(spec.weight_bound is not None))
        self.digits = Digits.of(len(spec.parties), self.blocks.count)
        self._adding = adding
        self.counting = counting(
            replace(
                spec,
                length=-(-self.blocks.count // self.digits.count),
                bound=self.digits.bound,
                weight_bound=None,
                bits=self.digits.bits,
                encoding=f"contributors of {spec.encoding}"[:255],
            )
        )
        self._latest: tuple[SumSpec, SumSession] | None = None

    @property
    def statement(self) -> Mapping[str, Any]:
        """The first sum's, which may be over fewer parties than all; the second is over exactly those."""
        stated = self.counting.statement
        trust = f"{stated.get('trust', '')} Coordinates to which fewer than {self.least} parties contribute"
        return {
            **stated,
            "modulus_bits": self.spec.modulus_bits,
            "encoding": self.spec.encoding,
            "contributors": self.least,
            "trust": f"{trust} are left out by the parties; how many contribute to each is known to all.",
        }

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> SumRound:
        """Both sums of a round. lost: as in the interface; who drops out once its vector counts ends the round."""
        self.number += 1
        return _ContributorRound(self, lost, terms)

    def over(self, parties: tuple[str, ...], kept: NDArray[np.bool_]) -> SumSession:
        """The second sum, over those who were counted, of the coordinates that are kept; as in the round before where
        both are the same. Raises: TooFewSurvivorsError where there is no sum over so few parties.
        """
        spec = self.spec
        if parties != spec.parties:
            spec = replace(spec, parties=parties, directory=spec.population)
        if not kept.all():
            which = hashlib.sha256(np.packbits(kept).tobytes() + self.spec.encoding.encode()).hexdigest()
            named = f"coordinates {which} of {self.spec.encoding}"[:255]
            spec = replace(spec, length=int(kept.sum()), encoding=named)
        if self._latest is None or self._latest[0] != spec:
            try:
                self._latest = spec, self._adding(spec)
            except SpecError as error:  # no threshold withstands that many corrupt ones among so few
                raise TooFewSurvivorsError(
                    f"no sum over the {len(parties)} parties that were counted: {error}",
                    survivors=len(parties),
                    needed=len(self.spec.parties),
                ) from None
        return self._latest[1]

    def agreed(self, party: str) -> Agreed | None:
        """Of the second sum."""
        if self._latest is None or party not in self._latest[0].members:
            return None
        return self._latest[1].agreed(party)


@dataclass(frozen=True)
class Blocks:
    """Coordinates that are counted together: `size` in a row; the last ones, `alone` of them, each for itself."""

    length: int
    size: int
    alone: int

    @property
    def _together(self) -> int:
        return -(-(self.length - self.alone) // self.size)

    @property
    def count(self) -> int:
        """Of blocks."""
        return self._together + self.alone

    def full(self, vector: IntVector) -> NDArray[np.bool_]:
        """Return in which blocks a vector has no zero: shape (count,)."""
        rest = self.length - self.alone
        padded = np.ones(self._together * self.size, dtype=np.bool_)
        padded[:rest] = vector[:rest] != 0
        return np.concatenate([padded.reshape(-1, self.size).all(axis=1), vector[rest:] != 0])

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return each coordinate's value from its block's: shape (length,)."""
        rest = self.length - self.alone
        return np.concatenate([np.repeat(values[: self._together], self.size)[:rest], values[self._together :]])


@dataclass(frozen=True)
class Digits:
    """How counts of at most n parties share the words of a sum: `count` of them in one, as digits in base n + 1."""

    parties: int
    count: int

    @classmethod
    def of(cls, parties: int, length: int) -> Self:
        """As many as take the fewest bits each, of words below 2^62, and no more than there are coordinates."""
        made = (cls(parties, count) for count in range(1, min(length, 62) + 1))
        return min((each for each in made if each.bits <= 62), key=lambda each: each.bits / each.count)

    @property
    def bits(self) -> int:
        """Of a word. Digits never carry: each is at most n."""
        return int(((self.parties + 1) ** self.count - 1).bit_length())

    @property
    def bound(self) -> int:
        """The largest word of one party, all of whose digits are 1."""
        return int(((self.parties + 1) ** self.count - 1) // self.parties)

    @property
    def _powers(self) -> IntVector:
        return np.array([(self.parties + 1) ** place for place in range(self.count)], dtype=np.int64)

    def words(self, there: NDArray[np.bool_]) -> IntVector:
        """One party's words: int64, shape (ceil(length / count),)."""
        padded = np.zeros(-(-len(there) // self.count) * self.count, dtype=np.int64)
        padded[: len(there)] = there
        return np.asarray(padded.reshape(-1, self.count) @ self._powers)

    def counts(self, total: IntVector, length: int) -> IntVector:
        """How many parties contribute to each coordinate, of the sum of their words modulo 2^bits."""
        words = np.asarray(total) & np.int64((1 << self.bits) - 1)
        return np.asarray((words[:, None] // self._powers % (self.parties + 1)).ravel()[:length])


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
        full = self._session.blocks.full(plain)
        self._counting.submit(party, self._session.digits.words(full))
        self._vectors[party] = plain * self._session.blocks.spread(full)

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
        blocks = session.blocks
        counts = blocks.spread(session.digits.counts(np.asarray(counted.total), blocks.count))
        dropped = (counts > 0) & (counts < session.least)
        self.left_out = int(dropped.sum())
        kept = self._kept(counts)
        adding = session.over(counted.survivors, kept).begin(None, self._terms)
        for party in counted.survivors:
            adding.submit(party, np.where(dropped, 0, self._vectors.pop(party))[kept])
        added = adding.finish()
        total = np.zeros(session.spec.length, dtype=np.int64)
        total[kept] = np.asarray(added.total)
        told = -(-blocks.count // 8)  # which blocks are left, a bit for each
        down = _both(counted.bytes_down, added.bytes_down)
        return SumResult(
            total=total,
            survivors=added.survivors,
            bytes_up=_both(counted.bytes_up, added.bytes_up),
            bytes_down={party: count + told * (party in added.bytes_down) for party, count in down.items()},
        )

    def _kept(self, counts: IntVector) -> NDArray[np.bool_]:
        """What the second sum is of: those that are left, where that saves more than new keys cost; else all. A weight
        stays the last one.
        """
        spec = self._session.spec
        kept = counts >= self._session.least
        kept[-1] |= spec.weight_bound is not None or not kept.any()  # a sum has a coordinate; this one may be zero
        saved = int((~kept).sum()) * spec.modulus_bits / 8
        return kept if saved > _KEYS * len(spec.parties) else np.ones(spec.length, dtype=np.bool_)


def _both(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {party: count + second.get(party, 0) for party, count in first.items()}
