"""Which secure sum when: trips, bytes, who is withstood and who must be online, for so many parties.

>>> [row.honest for row in which_sum(parties=10, corrupt=2, dropouts=1).rows][:2]  # of Plain, of Masked
[1, 7]
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.modular_integers import packed_bytes
from choral.protocols.errors import SpecError
from choral.protocols.interface import SumSpec
from choral.protocols.masking import messages
from choral.protocols.masking.ahead.messages import AheadSetup, roster_limit, survivors_limit
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.messages import SumSetup

MOST_PARTIES = 10_000

EXPLAINED = """\
trips      of a round in a session, each a message and its answer
kB up      of the busiest party in a round, at most; kB down without the model
colluders  parties that may pool what they see with a malicious server
honest     the fewest honest vectors in a sum that these can have opened
vectors    how many must come: of those who drop out none does
last       how many parties must be there to the end of the round"""
SEMI_HONEST = "*          only if the server follows the protocol; else it reads every vector"
WIDTH = 80
_COLUMNS = (23, 6, 9, 9, 11, 7, 9, 5)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of sum. bytes_up, bytes_down: of the busiest party in a round, at most, the model not counted.

    corrupt: how many parties may collude with the server. server: what the figures for it are for. honest: the fewest
    honest vectors in a sum that these can have opened. vectors: the smallest set of survivors; last: how many parties
    must answer in the last trip. refused: why there is no such sum; then the rest is None.
    """

    sum: str
    trips: int | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    corrupt: int | None = None
    server: str | None = None
    honest: int | None = None
    vectors: int | None = None
    last: int | None = None
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return textwrap.fill(f"{self.sum:<25}no: {self.refused}", WIDTH, subsequent_indent=" " * 25)
        up, down = (f"{(size or 0) / 1000:.1f}" for size in (self.bytes_up, self.bytes_down))
        honest = f"{self.honest}{'*' if self.server == 'semi-honest' else ''}"
        return _line(self.sum, self.trips, up, down, self.corrupt, honest, self.vectors, self.last)


def _line(first: str, *others: Any) -> str:
    return f"{first:<{_COLUMNS[0]}}" + "".join(f"{it:>{width}}" for it, width in zip(others, _COLUMNS[1:], strict=True))


@dataclass(frozen=True, kw_only=True)
class SumTable:
    """The answer of :func:`which_sum`. bits: of one party's value, its sign included."""

    parties: int
    corrupt: int
    dropouts: int
    length: int
    bits: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """The table and what its columns are, in lines of 80 characters."""
        collude = "collude" if self.corrupt != 1 else "colludes"
        drop = "drop out" if self.dropouts != 1 else "drops out"
        head = (
            f"{self.parties} parties, {self.length:,} values of {self.bits} bits; {self.corrupt} {collude} with the"
            f" server, {self.dropouts} {drop}"
        )
        semi = [SEMI_HONEST] if any(row.server == "semi-honest" for row in self.rows) else []
        titles = _line("sum", "trips", "kB up", "kB down", "colluders", "honest", "vectors", "last")
        return "\n".join((textwrap.fill(head, WIDTH), "", titles, *map(str, self.rows), "", EXPLAINED, *semi))


def which_sum(*, parties: int, corrupt: int, dropouts: int, length: int = 100_000, bits: int = 16) -> SumTable:
    """Every kind of sum for so many parties, of which some collude with the server and some drop out.

    parties: 2 to MOST_PARTIES, all in the roster. length: values in a vector; bits: of one value, its sign included.
    Raises: SpecError for a number out of range.
    """
    n = checks.whole(parties, "parties", 2, MOST_PARTIES)
    colluding = checks.whole(corrupt, "corrupt", 0, n - 1)
    gone = checks.whole(dropouts, "dropouts", 0, n - 1)
    bits = checks.whole(bits, "bits", 2, 48)
    spec = SumSpec(parties=tuple(f"party {place}" for place in range(n)), length=length, bound=1 << bits - 1)

    def masks() -> Masked:
        return Masked(corrupt=colluding, dropouts=gone, min_survivors=n - gone)

    kinds: dict[str, Callable[[], Row]] = {
        "Plain": lambda: _plain(spec),
        "Masked": lambda: _masked(spec, masks()),
        "Masked, trips=3": lambda: _masked(spec, replace(masks(), trips=3)),
        "Masked, trips=2": lambda: _two_trips(spec, masks()),
        "Homomorphic, split key": lambda: _split(spec, masks()),
        "Homomorphic, shared key": lambda: _shared(spec, n - gone),
    }
    rows = tuple(_row(name, make) for name, make in kinds.items())
    return SumTable(parties=n, corrupt=colluding, dropouts=gone, length=spec.length, bits=bits, rows=rows)


def _row(name: str, make: Callable[[], Row]) -> Row:
    try:
        return make()
    except SpecError as error:
        return Row(sum=name, refused=str(error))


def _plain(spec: SumSpec) -> Row:
    up = packed_bytes(spec.length, spec.modulus_bits)
    return Row(
        sum="Plain", trips=1, bytes_up=up, bytes_down=0, corrupt=0, server="malicious", honest=1, vectors=1, last=1
    )


def _masked(spec: SumSpec, config: Masked) -> Row:
    setup = config.setup(spec, session=bytes(16))
    up, down = _masked_bytes(setup, config.trips)
    return Row(
        sum="Masked" if config.trips == 4 else f"Masked, trips={config.trips}",
        trips=config.trips,
        bytes_up=up,
        bytes_down=down,
        corrupt=setup.corrupt,
        server=setup.server,
        honest=setup.floor if isinstance(setup, AheadSetup) else setup.min_survivors - setup.corrupt,
        vectors=setup.min_survivors,
        last=setup.threshold,
    )


def _two_trips(spec: SumSpec, config: Masked) -> Row:
    """With the largest smallest sum that the dropouts leave room for, which is the default."""
    return _masked(spec, Masked(corrupt=config.corrupt, dropouts=config.dropouts, trips=2))


def _masked_bytes(setup: SumSetup, trips: int) -> tuple[int, int]:
    """Of a round whose keys rode on the one before: :mod:`choral.protocols.masking.messages` has the formulas."""
    k, n, limit = setup.neighbours, len(setup.roster), messages.limit
    vector = packed_bytes(setup.length, setup.modulus_bits)
    up = limit(messages.DealtShares, k) + limit(messages.Upload, vector) + limit(messages.Unmask, setup.holders)
    begin, roster, dealt = limit(messages.Begin), limit(messages.Roster, k), limit(messages.Deliveries, k)
    survivors, confirmed = limit(messages.Survivors, math.ceil(n / 8)), limit(messages.Confirmations, setup.threshold)
    if trips == 4:
        return up + limit(messages.Confirm), limit(messages.Bundle, begin + roster) + dealt + survivors + confirmed
    up += limit(messages.Advertise)
    if trips == 3:
        down = limit(messages.Bundle, begin + dealt) + survivors + limit(messages.Bundle, confirmed + roster)
        return up + limit(messages.Confirm), down
    return up + roster_limit(0), limit(messages.Bundle, begin + dealt) + limit(
        messages.Bundle, survivors_limit(n) + roster
    )


def _split(spec: SumSpec, config: Masked) -> Row:
    from choral.protocols.homomorphic.split.party_driver import chosen, key_spec

    parameters = chosen(spec)
    keys = _masked(key_spec(parameters), config)
    ciphertext = parameters.ciphertext_bytes + parameters.messages * messages.ENVELOPE
    return replace(keys, sum="Homomorphic, split key", bytes_up=(keys.bytes_up or 0) + ciphertext)


def _shared(spec: SumSpec, smallest: int) -> Row:
    from choral.errors import ConfigError

    try:
        from choral.protocols.homomorphic.shared.bfv import choose
    except ConfigError as error:
        return Row(sum="Homomorphic, shared key", refused=str(error))
    plan = choose(len(spec.parties), spec.bound, spec.length)
    blocks = -(-spec.length // plan.block)
    ciphertext = blocks * plan.parameters.seeded_bytes
    total = packed_bytes(spec.length, spec.modulus_bits)
    return Row(
        sum="Homomorphic, shared key",
        trips=2,
        bytes_up=ciphertext + total,
        bytes_down=blocks * plan.parameters.full_bytes,
        corrupt=0,
        server="semi-honest",
        honest=smallest,
        vectors=smallest,
        last=1,
    )
