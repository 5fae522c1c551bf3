"""How many honest vectors a sum has at least that is opened without a confirmation of its set of survivors.

Without the confirmation a server that does what it likes may show every party another set of survivors. It still opens
one sum at most, but that need not be over any set that it showed. Of n parties c collude with the server, h = n - c do
not; a secret needs t shares, t - c of them of honest holders; no honest holder answers for fewer than v survivors.

Each honest party is left out of the sum, or in it, by what t - c honest holders at least were shown: they gave out its
key, or its seed. Each honest holder gave out at most n - v keys. So of the honest at most

    floor(h (n - v) / (t - c))

are out, and the others are in. docs/two-trips.md has the whole argument, and its conditions;
tests/two_trips_search.py holds it against every mixture of views and rosters of up to six parties.
"""

from __future__ import annotations

from choral.protocols.errors import SpecError


def honest_floor(parties: int, corrupt: int, threshold: int, smallest: int) -> int:
    """The least number of honest vectors in a sum of that many parties that is opened without a confirmation.

    threshold: t, a party's own share counted. smallest: v, the least set of survivors that a party answers for.
    At least 0: then nothing is said. The least over all rosters of a round, which may have fewer parties.

    Raises: SpecError unless 2 t > parties + corrupt, without which two sums may be opened, or a single vector; or for
    a set of survivors below the threshold, or above the parties.
    """
    if corrupt < 0 or not 2 * threshold > parties + corrupt:
        raise SpecError(
            f"without a confirmation one sum at most is opened if 2 t > {parties} + {corrupt}, got t = {threshold}",
            hint="a threshold for a malicious server, or four trips",
        )
    if not threshold <= smallest <= parties:
        raise SpecError(f"expected {threshold} <= survivors <= {parties}, got {smallest}")
    return max(0, min(_floor(there, corrupt, threshold, smallest) for there in range(smallest, parties + 1)))


def _floor(parties: int, corrupt: int, threshold: int, smallest: int) -> int:
    """With so many parties in the round's roster, all that collude among them."""
    honest = parties - corrupt
    return honest - honest * (parties - smallest) // (threshold - corrupt)


def least_survivors(parties: int, corrupt: int, threshold: int, floor: int = 2) -> int:
    """The least set of survivors whose sum has at least ``floor`` honest vectors. Raises: SpecError where none has."""
    for smallest in range(threshold, parties + 1):
        if honest_floor(parties, corrupt, threshold, smallest) >= floor:
            return smallest
    raise SpecError(
        f"no set of survivors of {parties} parties, {corrupt} of them corrupt, has {floor} honest vectors at least",
        hint="expect fewer corrupt parties, or take four trips",
    )
