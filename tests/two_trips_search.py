"""Every way to play parties off against each other in a sum of two trips, for up to six parties.

    python tests/two_trips_search.py --parties 6

The server and the corrupt parties are one adversary. It chooses for each honest party the roster that it is shown (or
none), the set of survivors that it is shown (any set, or none), and which packets reach it. What an honest party then
gives out is `answer`, which knows nothing of the floor; what the adversary learns of the honest vectors is linear
algebra on what was uploaded and given out (`learned`), which knows nothing of it either. The search takes the least
part of the honest vectors whose sum is learned, over all of these choices.

Parties are numbers and sets of them are bits: 0 to h - 1 are honest, h to n - 1 are corrupt.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """n, c, v and t: a party takes part with t holders at least, and answers for v survivors at least."""

    parties: int
    corrupt: int
    smallest: int
    threshold: int

    @property
    def honest(self) -> int:
        return self.parties - self.corrupt

    @property
    def needed(self) -> int:
        """How many shares of honest holders open a secret."""
        return self.threshold - self.corrupt

    @property
    def sound(self) -> bool:
        return 2 * self.threshold > self.parties + self.corrupt


@dataclass(frozen=True)
class Protocol:
    """self_masks: a vector has a mask of its own, whose seed is shared. shared_keys: so is the key of who dropped out;
    otherwise each survivor gives out its own masks with those. signed_rosters: a holder answers only for who has signed
    the roster that it was shown itself.
    """

    self_masks: bool = True
    shared_keys: bool = True
    signed_rosters: bool = True


TWO_TRIPS = Protocol()
NO_ROSTER_CHECK = Protocol(signed_rosters=False)
ONE_MASK_PER_PAIR = Protocol(self_masks=False, shared_keys=False)
STATIC_KEYS = Protocol(shared_keys=False)

Given = tuple[int, int, int]
"""Of whom seeds are given out, of whom keys (sets), and masks of which pairs (bits of `pair`)."""
State = tuple[int, int]
"""How often each secret was given out by an honest holder, four bits for each; and the pairs."""


def pair(one: int, other: int) -> int:
    low, high = sorted((one, other))
    return 1 << high * (high - 1) // 2 + low


def members(group: int) -> list[int]:
    return [party for party in range(group.bit_length()) if group >> party & 1]


def answer(
    protocol: Protocol, sizes: Sizes, rosters: Sequence[int | None], holder: int, survivors: int, opened: int
) -> Given | None:
    """What an honest holder gives out; None where it refuses. opened: whose packets it could open."""
    own = rosters[holder]
    if own is None or not survivors >> holder & 1 or survivors & ~own or survivors.bit_count() < sizes.smallest:
        return None
    signed_another = any(rosters[party] != own for party in members(survivors) if party < sizes.honest)
    if protocol.signed_rosters and signed_another:
        return None
    held = own & opened | 1 << holder
    dropped = own & ~survivors
    if protocol.shared_keys:
        return held & survivors, held & dropped, 0
    return held & survivors, 0, sum(pair(holder, party) for party in members(dropped))


def learned(protocol: Protocol, sizes: Sizes, rosters: Sequence[int | None], given: Given) -> list[int]:
    """The sets of honest parties whose sums the adversary can tell. given: who is open, by enough shares.

    Party p uploads x_p + b_p + sum of +-m_pq over q in its roster. A combination of uploads with weights w is free of
    unknown masks if w_p = 0 where b_p is unknown; w_p = w_q where both have m_pq, unknown, with opposite signs; and
    w_p = 0 where p alone has it. So the combinations are spanned by the connected sets that have no weight forced to 0.
    """
    seeds, keys, pairs = given
    everyone = [party for party in range(sizes.honest) if rosters[party] is not None]
    group = {party: 1 << party for party in everyone}
    spoiled = 0
    for party in everyone:
        if protocol.self_masks and not seeds >> party & 1:
            spoiled |= 1 << party
        for peer in members(rosters[party] or 0):
            if peer == party or peer >= sizes.honest or pairs & pair(party, peer):
                continue
            if keys >> party & 1 or keys >> peer & 1:
                continue
            theirs = rosters[peer]
            if theirs is None or not theirs >> party & 1:
                spoiled |= 1 << party
            else:
                joined = group[party] | group[peer]
                for member in members(joined):
                    group[member] = joined
    return sorted({found for found in group.values() if not found & spoiled})


def states(protocol: Protocol, sizes: Sizes, rosters: Sequence[int | None], *, withheld: bool) -> set[State]:
    """All that can be given out, over every mixture of views; and of packets that do not arrive, if ``withheld``."""
    everyone = (1 << sizes.parties) - 1
    reached: set[State] = {(0, 0)}
    for holder in range(sizes.honest):
        options: set[State] = {(0, 0)}
        for survivors in range(1 << sizes.parties):
            for opened in range(1 << sizes.parties) if withheld else (everyone,):
                given = answer(protocol, sizes, rosters, holder, survivors, opened)
                if given is not None:
                    options.add((_spread(given[0] | given[1] << sizes.parties), given[2]))
        reached = {(told + more, pairs | new) for told, pairs in reached for more, new in options}
    return reached


def _spread(group: int) -> int:
    """Four bits for each member, to be added up."""
    return sum(1 << 4 * member for member in members(group))


def _open(sizes: Sizes, state: State) -> Given:
    told, pairs = state
    known = [
        sum(1 << party for party in range(sizes.parties) if told >> 4 * (party + shift) & 15 >= sizes.needed)
        for shift in (0, sizes.parties)
    ]
    return known[0], known[1], pairs


@dataclass(frozen=True)
class Found:
    """least: the fewest honest vectors whose sum is learned; None where nothing is. sums: the most that are learned at
    a time. both: whether both secrets of one party are.
    """

    least: int | None = None
    sums: int = 0
    both: bool = False

    def __or__(self, other: Found) -> Found:
        least = min((one for one in (self.least, other.least) if one is not None), default=None)
        return Found(least, max(self.sums, other.sums), self.both or other.both)


def outcomes(
    protocol: Protocol, sizes: Sizes, rosters: Sequence[int | None], *, withheld: bool = False
) -> Iterator[tuple[Given, list[int]]]:
    honest = (1 << sizes.honest) - 1
    for given in {_open(sizes, state) for state in states(protocol, sizes, rosters, withheld=withheld)}:
        seeds, keys, pairs = given
        yield (seeds & honest, keys & honest, pairs), learned(protocol, sizes, rosters, given)


def search(
    protocol: Protocol, sizes: Sizes, every_roster: Iterable[Sequence[int | None]], *, withheld: bool = False
) -> Found:
    found = Found()
    for rosters in every_roster:
        for (seeds, keys, _), sums in outcomes(protocol, sizes, rosters, withheld=withheld):
            least = min((one.bit_count() for one in sums), default=None)
            found |= Found(least, len(sums), bool(seeds & keys))
    return found


def one_roster(sizes: Sizes) -> list[list[int | None]]:
    """All are shown the whole roster."""
    return [[(1 << sizes.parties) - 1] * sizes.honest]


def one_is_shown_less(sizes: Sizes) -> Iterator[list[int | None]]:
    """All are shown the whole roster, but for one honest party, which is shown any that it takes part in."""
    everyone = (1 << sizes.parties) - 1
    for roster in range(1, everyone + 1, 2):
        if roster.bit_count() >= sizes.threshold:
            yield [roster] + [everyone] * (sizes.honest - 1)


def any_rosters(sizes: Sizes) -> Iterator[tuple[int | None, ...]]:
    """Each honest party is shown any roster that it takes part in, or none.

    Left out are assignments under which nobody could answer, whatever it is shown: no roster has so many honest parties
    that signed it that there can be a set of survivors of them and the corrupt.
    """
    choices: list[list[int | None]] = [
        [None, *(r for r in range(1 << sizes.parties) if r >> party & 1 and r.bit_count() >= sizes.threshold)]
        for party in range(sizes.honest)
    ]
    for rosters in itertools.product(*choices):
        shown = [roster for roster in rosters if roster is not None]
        if any(shown.count(roster) + sizes.corrupt >= sizes.smallest for roster in set(shown)):
            yield rosters


def rosters_by_size(sizes: Sizes) -> Iterator[list[int | None]]:
    """One assignment for each that differs in more than who is who, of those who sign a roster that is answered for.

    They are g honest parties with a roster of themselves, e other honest parties and k corrupt ones. There are no two
    such groups: each has v - c >= t - c > h / 2 honest members. Nobody gives out the seed of a party outside of
    the group, so what it uploads, under whichever roster, is of no use: here it uploads nothing.
    """
    assert sizes.sound
    for group in range(max(1, sizes.smallest - sizes.corrupt), sizes.honest + 1):
        for extra in range(sizes.honest - group + 1):
            for corrupt in range(sizes.corrupt + 1):
                roster = (1 << group + extra) - 1 | (1 << corrupt) - 1 << sizes.honest
                yield [roster] * group + [None] * (sizes.honest - group)


def every_setup(most: int, *, sound: bool = True) -> Iterator[Sizes]:
    """All n, c, v, t of up to so many parties that a party may be asked to sign."""
    for parties in range(2, most + 1):
        for corrupt in range(parties - 1):
            for threshold in range(max(2, corrupt + 1), parties + 1):
                for smallest in range(max(threshold, corrupt + 2), parties + 1):
                    sizes = Sizes(parties, corrupt, smallest, threshold)
                    if sizes.sound or not sound:
                        yield sizes


def main(words: list[str]) -> int:
    from choral.protocols.masking.ahead.floor import honest_floor

    parser = argparse.ArgumentParser(description="Search for the smallest sum that two trips can be made to open.")
    parser.add_argument("--parties", type=int, default=6, help="up to so many")
    tight = count = 0
    print("  n  c  v  t  floor  found")
    for sizes in every_setup(parser.parse_args(words).parties):
        floor = honest_floor(sizes.parties, sizes.corrupt, sizes.threshold, sizes.smallest)
        found = search(TWO_TRIPS, sizes, rosters_by_size(sizes))
        held = found.least is not None and found.least >= floor and found.sums == 1 and not found.both
        count, tight = count + 1, tight + (found.least == floor)
        sizes_of = f"{sizes.parties:3}{sizes.corrupt:3}{sizes.smallest:3}{sizes.threshold:3}"
        print(f"{sizes_of}{floor:7}{found.least if found.least is not None else '-':>7}{'' if held else '  UNDERCUT'}")
        if not held:
            return 1
    print(f"{count} setups: the floor is never undercut, and reached in {tight}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
