"""The command ``choral sums``: which secure sum when."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from choral.cli.arguments import parse


@dataclass(frozen=True, kw_only=True)
class SumsFlags:
    """Which secure sum when: trips, bytes, whom it withstands, who must be online.

    One line for each kind of sum over so many parties. A sum that cannot be had for these numbers says why.
    """

    parties: int
    """How many take part, all of them in every round."""
    corrupt: int = 0
    """How many of them may collude with the server, which may do as it likes."""
    dropouts: int = 0
    """How many of them may vanish in a round."""
    length: int = 100_000
    """Values in a vector: parameters of the model."""
    bits: int = 16
    """Bits of one party's value, its sign included."""
    json: bool = False
    """Print the table as JSON."""


def sums(words: list[str]) -> int:
    """Print the table."""
    wanted = parse("sums", words, SumsFlags)
    from choral.protocols.which_sum import which_sum

    table = which_sum(
        parties=wanted.parties,
        corrupt=wanted.corrupt,
        dropouts=wanted.dropouts,
        length=wanted.length,
        bits=wanted.bits,
    )
    print(json.dumps(asdict(table), indent=1) if wanted.json else table)
    return 0
