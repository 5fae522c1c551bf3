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

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from choral.protocols.errors import PolicyError, SpecError
from choral.protocols.masking.ahead.messages import AheadSetup, Trips
from choral.protocols.masking.messages import SumSetup
from choral.protocols.masking.policy import COHORT_TRUST, Policy


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


def check_floor(setup: AheadSetup, policy: Policy) -> None:
    """What a party holds of a setup beyond the masked sum's: it believes its own computation.

    Raises: PolicyError for a sparse graph, a floor that is not the one of these numbers, or one below two honest
    vectors or the policy's smallest sum less its colluders; of two trips for a semi-honest server's threshold.
    """
    if not setup.complete:
        raise PolicyError("shares are dealt a round ahead on a complete graph only, where all mask with all")
    try:
        floor = floor_of(setup)
    except SpecError as error:
        raise PolicyError(str(error)) from None
    if setup.floor != floor:
        raise PolicyError(f"the setup says {setup.floor} honest vectors in a sum at least, and it is {floor}")
    least = max(2, policy.minimum_cohort - setup.corrupt)
    if floor < least:
        raise PolicyError(f"a sum may have {floor} honest vectors, this party accepts {least} at least")


def floor_of(setup: AheadSetup) -> int:
    """Of three trips what the set of survivors leaves, which is confirmed; of two :func:`honest_floor`."""
    if setup.trips == 3:
        return setup.min_survivors - setup.corrupt
    return honest_floor(len(setup.roster), setup.corrupt, setup.threshold, setup.min_survivors)


def dealt_ahead(setup: SumSetup, trips: Trips, wanted: int | None, there: int) -> AheadSetup:
    """The terms of a masked sum in two or three trips. wanted: no sum of fewer parties is opened, of two trips neither;
    None, and of two trips so many are asked for as will be ``there``, since the floor is highest then.

    Raises: SpecError for a sparse graph; for dropouts that leave fewer than the survivors that this takes.
    """
    n, corrupt, smallest = len(setup.roster), setup.corrupt, setup.min_survivors
    if not setup.complete:
        raise SpecError(
            f"{trips} trips on a sparse graph, of {n} parties: shares are dealt ahead where all mask with all",
            hint="take trips=4, or at most 64 parties",
        )
    if trips == 2:
        floor = max(2, (wanted or 2) - corrupt)
        smallest = max(smallest, least_survivors(n, corrupt, setup.threshold, floor))
        if smallest > n - setup.dropouts:
            raise SpecError(
                f"two trips need {smallest} of {n} survivors for {floor} honest vectors in every sum, and"
                f" {setup.dropouts} dropouts leave {n - setup.dropouts}",
                hint="expect fewer dropouts or a smaller sum, or take trips=3",
            )
        if wanted is None:
            smallest = max(smallest, there)
    fields = {name: getattr(setup, name) for name in setup.__struct_fields__}
    made = AheadSetup(**{**fields, "min_survivors": smallest}, trips=trips)
    return replace(made, floor=floor_of(made))


def fewest_opened(setup: SumSetup) -> int:
    """Over how few parties a sum of this setup may be opened, whatever the server does: what noise is sized by.

    In two trips fewer than its min_survivors, which are what each party asks for.
    """
    return setup.floor + setup.corrupt if isinstance(setup, AheadSetup) else setup.min_survivors


def promised(setup: SumSetup, wanted: int | None) -> int:
    """Over how few parties no sum is opened, as it is stated of rosters of every size: as many as were wanted, and as
    leave two honest. None were wanted: what this setup comes to.

    What a setup comes to is more for some rosters than for larger ones, so it promises nothing of another size.
    """
    if wanted is None or not isinstance(setup, AheadSetup) or setup.trips != 2:
        return fewest_opened(setup)
    return max(wanted, setup.corrupt + 2)


def stated_ahead(setup: AheadSetup, wanted: int | None) -> Mapping[str, Any]:
    """What is said of such a sum beyond, or in the place of, what is said of every masked one. wanted: as `promised`.

    min_survivors: over how few parties a sum may be opened at least, which is what noise is sized by; of two trips
    these are fewer than the parties ask for.
    """
    facts = {"trips": setup.trips, "honest_floor": setup.floor}
    if setup.trips == 3:
        return facts
    fewest = promised(setup, wanted)
    honest = fewest - setup.corrupt
    return facts | {
        "honest_floor": honest,
        "min_survivors": fewest,
        "asked_survivors": setup.min_survivors,
        "trust": (
            f"The server may do whatever it likes and may collude with up to {setup.corrupt} of {len(setup.roster)}"
            f" parties: together they learn one sum over at least {honest} of the others, and no single vector of"
            " theirs. In two trips nobody confirms who is in it: the server may choose that, and leave out more than it"
            f" says.{COHORT_TRUST[setup.cohort]} Each party trusts its pinned directory of identities, which in this"
            " in-process run was made by the process itself."
        ),
    }
