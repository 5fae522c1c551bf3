"""``Grouped``: sums over random groups of parties, and a robust mean over the groups' means.

A secure sum hides who poisons it. So the parties are dealt into groups of g or g + 1, anew in each round, each group
has a secure sum of its own, and the means of the groups, which are published, are joined by a rule that a minority of
them cannot move far:

    groups    from the operating system's randomness, after the parties are known           a public partition
    group     its own secure sum: sum of w_k v_k, and of w_k                                 its mean, public
    all       a group whose weight is none that so many parties can have is left out
    result    rule(means), times the weight of all, as whole numbers: the mean is within half a step over that weight

**What it costs in privacy**: a party's vector is hidden among the g of its group, not among n. Whoever sees the result
of a round has seen the mean of every group.

**What it withstands**: fewer than half of the groups spoiled (the trimmed mean: a quarter). One attacker spoils one
group. The statement says how many groups are spoiled on average if a share `attackers` of the parties poison, and how
often so many that the rule says nothing.

**What it does not**: attackers in more groups; poison that stays within what honest group means differ by; means of
parties whose data differ, which are no outliers and are treated as such: a median is not the mean of skewed updates.

For rehearsals in one process: at sites of their own the groups would have to be drawn by all parties together (each
commits to a number, then all reveal), and so parties refuse it. Reference: Chen, Su, Xu 2017, "Distributed statistical
machine learning in adversarial settings" (median of means).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from choral.protocols import argument_checks as checks
from choral.protocols.driver import Agreed, NeedsVector, RoundTerms
from choral.protocols.errors import SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import (
    IntVector,
    Losses,
    SecureSum,
    Step,
    SumResult,
    SumRound,
    SumSession,
    SumSpec,
    check_spec,
)
from choral.protocols.robust.rules import Rule, check_rule, robust_mean, spoiled, withstands

if TYPE_CHECKING:
    import torch

    from choral.protocols.masking.policy import Policy

LEAST_GROUPS = 3  # of fewer a median is a mean


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Robust means over the sums of random groups. For vectors whose last coordinate is the party's weight.

    sums: the secure sum of a group, such as ``Masked(corrupt=1)``. Who may collude is counted in the whole directory,
        and all of them may be in one group: corrupt is at most group - 2.
    robust: "median", "trimmed" (without a quarter of the groups at either end), or "geometric".
    group: parties in a group, at least; 3 or more. The more, the better hidden, and the fewer attackers are withstood.
    attackers: the share of the parties that is assumed to poison, for the statement alone.

    Raises: SpecError for a setting of another type or out of range; from ``open`` for fewer than three groups, or
        vectors without a weight.
    """

    sums: SecureSum
    robust: Rule = "median"
    group: int = 5
    attackers: float = 0.05

    def __post_init__(self) -> None:
        check_rule(self.robust)
        object.__setattr__(self, "group", checks.whole(self.group, "group", 3, 1 << 16))
        share = checks.share(self.attackers, "attackers")
        if not isinstance(share, float) or not 0.0 < share < 0.5:
            raise SpecError(f"attackers is {checks.shown(self.attackers)}, expected a share between 0 and 0.5")
        if isinstance(self.sums, Grouped | type) or not hasattr(self.sums, "open"):
            raise SpecError(
                f"sums is {checks.shown(self.sums)}, expected a secure sum",
                hint="Grouped(sums=Masked(corrupt=1), robust=..., group=5)",
            )
        if self.sums.name == "plain":
            raise SpecError(
                "groups with plain sums: the server sees every vector anyway", hint="Grouped(sums=Masked(corrupt=1))"
            )
        if getattr(self.sums, "contributors", None) is not None:
            raise SpecError("groups with contributors: they would be counted in each group", hint="one of the two")
        if getattr(self.sums, "trips", 4) != 4:
            raise SpecError("groups with sums in two or three trips", hint="Masked(trips=4), which is the default")

    @property
    def name(self) -> str:
        return self.sums.name

    def open(self, spec: SumSpec, *, policy: Policy | None = None) -> GroupedSession:
        """policy: of the parties, for the sum of each group. Raises: SpecError; PolicyError."""
        return GroupedSession(self, spec, policy)

    def party_driver(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: groups are drawn in rehearsals alone. Raises: SpecError."""
        _refuse()

    def server_driver(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: groups are drawn in rehearsals alone. Raises: SpecError."""
        _refuse()


def _refuse() -> NoReturn:
    raise SpecError(
        "groups of parties in processes of their own: who draws the groups could put its colluders where it likes",
        hint="rehearse with federate, or take one sum over all",
    )


def dealt(parties: Sequence[str], group: int) -> tuple[tuple[str, ...], ...]:
    """Return a partition into groups of `group` or more, sizes as equal as can be, each equally likely."""
    mixed = list(parties)
    secrets.SystemRandom().shuffle(mixed)
    count = len(mixed) // group
    order = {party: place for place, party in enumerate(parties)}
    return tuple(tuple(sorted(mixed[at::count], key=order.__getitem__)) for at in range(count))


class GroupedSession:
    """See :class:`choral.protocols.interface.SumSession`."""

    def __init__(self, config: Grouped, spec: SumSpec, policy: Policy | None) -> None:
        check_spec(spec)
        groups = len(spec.parties) // config.group
        if groups < LEAST_GROUPS:
            raise SpecError(
                f"{len(spec.parties)} parties make {groups} groups of {config.group}, expected at least {LEAST_GROUPS}",
                hint="more parties in a round, or smaller groups, which hide less",
            )
        if spec.weight_bound is None or spec.bits is not None:
            raise SpecError(
                "groups of vectors without a weight, or with noise in the sum: what one party may do to a group's mean"
                " is not bounded",
                hint='record-level noise at each party (Privacy(noise="local")) goes with groups',
            )
        self.config, self.spec, self._policy, self.number = config, spec, policy, 0
        self.sizes = tuple(len(spec.parties[at::groups]) for at in range(groups))
        self._sample = self.opened(spec.parties[: min(self.sizes)])
        self._where: dict[str, SumSession] = {}

    def opened(self, parties: tuple[str, ...]) -> SumSession:
        """The sum of one group."""
        spec = replace(self.spec, parties=parties, directory=self.spec.population)
        return self.config.sums.open(spec, policy=self._policy)

    @property
    def statement(self) -> Mapping[str, Any]:
        """A group's, with what groups cost and withstand."""
        config, groups = self.config, len(self.sizes)
        attackers = round(config.attackers * len(self.spec.parties))
        chances = spoiled(self.sizes, attackers)
        average = float(sum(k * chance for k, chance in enumerate(chances)))
        most = withstands(config.robust, groups)
        beyond = float(sum(chances[most + 1 :]))
        said = (
            f"Robust mean ({config.robust}) over {groups} groups drawn at random: the mean of each group is published,"
            f" and a party is hidden among the {min(self.sizes)} of its group, not among {len(self.spec.parties)}."
            f" Withstands {most} spoiled groups; if {attackers} parties poison, {average:.1f} are spoiled on average,"
            f" and more than that with probability {beyond:.2g}."
        )
        return {
            **self._sample.statement,
            "robust": config.robust,
            "groups": groups,
            "anonymity_set": min(self.sizes),
            "attackers": attackers,
            "groups_spoiled_on_average": average,
            "groups_withstood": most,
            "probability_beyond": beyond,
            "trust": f"{self._sample.statement.get('trust', '')} {said}".strip(),
        }

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> SumRound:
        """Deal the groups, and begin a sum in each. Groups that cannot begin are left out."""
        self.number += 1
        return _GroupedRound(self, lost, terms)

    def agreed(self, party: str) -> Agreed | None:
        """Of its group's sum."""
        return self._where[party].agreed(party) if party in self._where else None


class _GroupedRound:
    """See :class:`choral.protocols.interface.SumRound`."""

    def __init__(self, session: GroupedSession, lost: Mapping[str, Step] | None, terms: RoundTerms | None) -> None:
        Losses(lost, session.spec.parties)  # refuses who is none
        self._session, self._number = session, session.number
        self._rounds: list[SumRound] = []
        self._of: dict[str, SumRound] = {}
        self.failed = 0
        session._where.clear()
        for group in dealt(session.spec.parties, session.config.group):
            own = {party: step for party, step in (lost or {}).items() if party in group}
            summing = session.opened(group)
            try:
                begun = summing.begin(own or None, terms)
            except TooFewSurvivorsError:
                self.failed += 1
                continue
            self._rounds.append(begun)
            for party in group:
                self._of[party], session._where[party] = begun, summing

    def needs(self, party: str) -> NeedsVector | None:
        """As in its group."""
        return self._of[party].needs(party) if party in self._of else None

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Into the sum of its group; nothing where that has too few parties to begin."""
        if self._number != self._session.number:
            raise StateUsedError("this round ended when the next one began")
        if party not in self._session.spec.members:
            raise SpecError(f"unknown party {party!r}", hint="parties are fixed when the session is opened")
        if party in self._of:
            self._of[party].submit(party, vector)

    def finish(self) -> SumResult:
        """Join the groups' means. Raises: TooFewSurvivorsError for fewer than three groups."""
        spec, config = self._session.spec, self._session.config
        means: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        survivors: list[str] = []
        weight = 0
        up, down = dict.fromkeys(spec.parties, 0), dict.fromkeys(spec.parties, 0)
        for begun in self._rounds:
            try:
                result = begun.finish()
            except TooFewSurvivorsError:
                self.failed += 1
                continue
            for party, count in result.bytes_up.items():
                up[party], down[party] = count, result.bytes_down[party]
            if (mean := group_mean(result, spec)) is None:
                self.failed += 1
                continue
            means.append(mean)
            survivors += result.survivors
            weight += int(result.total[-1])
        if len(means) < LEAST_GROUPS:
            raise TooFewSurvivorsError(
                f"{len(means)} groups have a mean, {self.failed} have none",
                survivors=len(means),
                needed=LEAST_GROUPS,
            )
        joined = robust_mean(np.stack(means), config.robust)
        total = np.append(np.rint(joined * weight).astype(np.int64), weight)
        kept = set(survivors)
        order = tuple(party for party in spec.parties if party in kept)
        return SumResult(total=total, survivors=order, bytes_up=up, bytes_down=down)


def group_mean(result: SumResult, spec: SumSpec) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return a group's mean, float64, or None where no honest parties have such a sum: a weight that so many cannot
    have, or a coordinate beyond what that weight allows.
    """
    weight, most = int(result.total[-1]), spec.weight_bound or 0
    if not len(result.survivors) <= weight <= len(result.survivors) * most:
        return None
    values = result.total[:-1]
    largest = spec.bound // most  # of a value of weight 1
    if len(values) and max(int(values.max()), -int(values.min())) > weight * largest:
        return None
    return np.asarray(values / weight)
