"""A step of a banded matrix mechanism whose noise comes in shares: what a ledger holds of it, and what steps cost.

Party i adds row t of C_i^-1 z_i to its part of the sum of step t, z_i Gaussian of deviation `share` clipping norms. A
record is of one party, and takes part in those of its party's steps whose numbers leave one remainder by `separation`,
m, with contributions of norm at most 1 (in clipping norms). If C has at most m bands, a record that takes part k times
costs one Gaussian mechanism of sensitivity |c| sqrt(k), c the column of C, and of the noise of `honest` shares: whoever
drops out of which step, and wherever parties begin their noise anew (docs/noise-in-shares.md has the lemma).

So steps cost what the record that takes part most often does: :func:`participations` counts, for each remainder, the
steps on a ledger. It needs no order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

import msgspec

from choral.errors import ConfigError
from choral.privacy.accounting.matrix_strategies import Banded
from choral.privacy.accounting.plain_numbers import as_float, as_integer
from choral.privacy.noise.share_rounding import check_shares


class BandedShares(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="banded_shares"):
    """`steps` opened sums of gradients of several parties, each with a share of noise that C correlates over steps.

    The steps are those of one party's plan from `number`, from 1, on; row: that of the first of them, from 0, in the
    numbering of all parties' sums. coefficients: the column of C, 1 and then at most
    separation - 1 numbers. share: the deviation of a party's z over the clipping norm. honest: shares in each sum that
    the adversary does not know, at least. deviation: `share` over the sum of the coefficients, which no norm of C
    exceeds, in steps of the grid that sums are rounded to, of up to `parties` parties and `length` coordinates.
    stretch: by how much further apart than the clipping norm neighbours may be. failure: the secure sum's, of one step,
    added to delta.
    """

    coefficients: tuple[float, ...]
    separation: int
    share: float
    honest: int
    parties: int
    deviation: float
    length: int
    stretch: float
    failure: float
    number: int
    steps: int
    row: int = 0

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "coefficients", Banded(self.coefficients).coefficients)
        for name in ("share", "deviation", "stretch", "failure"):
            msgspec.structs.force_setattr(self, name, as_float(name, getattr(self, name)))
        for name in ("separation", "honest", "parties", "length", "number", "steps"):
            msgspec.structs.force_setattr(self, name, as_integer(name, getattr(self, name)))
        msgspec.structs.force_setattr(self, "row", as_integer("row", self.row, 0))
        if len(self.coefficients) > self.separation:
            raise ConfigError(
                f"C has {len(self.coefficients)} bands, and a record takes part every {self.separation} steps: expected"
                " at most as many bands as steps",
                hint="Where a record's rows of C overlap, nothing is proved of noise in shares.",
            )
        check_shares(
            share=self.share,
            honest=self.honest,
            parties=self.parties,
            deviation=self.deviation,
            length=self.length,
            stretch=self.stretch,
            failure=self.failure,
        )

    @property
    def kind(self) -> BandedShares:
        """The same of a plan's first step: what alike steps have in common."""
        return msgspec.structs.replace(self, number=1, steps=1, row=0)

    @property
    def norm(self) -> float:
        """|c|: what one participation of a record moves C x by, in clipping norms."""
        return math.sqrt(math.fsum(value * value for value in self.coefficients))

    @property
    def noise_multiplier(self) -> float:
        """Of the Gaussian mechanism that one participation of a record costs: unknown noise over sensitivity."""
        return self.share * math.sqrt(self.honest) / (self.norm * (1.0 + self.stretch))

    @property
    def sample_rate(self) -> float:
        """One: nothing is claimed for sampling."""
        return 1.0


def participations(events: Iterable[BandedShares]) -> list[tuple[BandedShares, int]]:
    """Return each kind of step once, with how many of them the record is in that is in the most."""
    whole: Counter[BandedShares] = Counter()
    rest: dict[BandedShares, Counter[int]] = {}  # by remainder: how many more steps than at the one before
    for event in events:
        passes, more = divmod(event.steps, event.separation)
        whole[event.kind] += passes
        changes, first = rest.setdefault(event.kind, Counter()), event.number % event.separation
        past = first + more - event.separation  # how many are beyond the last remainder, and so from 0 on
        changes.update([first])
        changes.subtract([first + more])
        if past > 0:
            changes.update([0])
            changes.subtract([past])
    return [
        (kind, whole[kind] + max(accumulate(changes[at] for at in sorted(changes)))) for kind, changes in rest.items()
    ]
