"""Plans: what was fixed in advance is priced exactly, and a filter decides on whatever is added to it.

A ledger says what was released, and in front of it (:class:`choral.privacy.accounting.events.ReleasePlan`) what had
been fixed to be released before any of it was seen. Two rules follow, and every promise of this package keeps to them:

1. **The first plan** on a ledger is priced as a whole, by privacy loss distributions (for clients by Renyi DP): its
   parameters are fixed. Stopping before its end, for whatever reason, is post-processing of the whole plan, and covered
   by the whole plan's cost. What was really spent is printed beside, and is a bound for whoever had fixed in advance
   that he would stop there. A process that starts again goes on with the plan, as long as passes of it are left.
2. **A further plan** is admitted if a filter (:mod:`choral.privacy.accounting.filters`) admits the first plan *in
   full*, whether or not it came to its end, and all that was released together with the whole of the new plan. The new
   plan ends those before it.

Why this is right: whether the filter admits the whole first plan is settled before anything is released. If it does
not, nothing is ever added, and everything is (epsilon, delta)-DP by rule 1. If it does, everything on the ledger is
within the filter at every moment, and so (epsilon, delta)-DP by the filter's theorem, whatever was seen before the
later plans were made. A filter counts what was released, not what was planned, so that a plan which stopped early
leaves room for a later one.

Within a plan q, sigma and T are fixed, and everything else may be chosen as one goes: the model, the learning rate, an
adaptive clipping norm (noise is always sigma times the norm of that step), who is selected. That is what composition
allows. Correlated noise that is begun anew within a plan is of Gaussians alone, whose precisions add up whoever chooses
them (Smith and Thakurta 2022, "Fully adaptive composition for Gaussian differential privacy"), and no pass of a new
stream costs more than the planned pass that it takes the place of.

Events that no plan announces (ledgers of older versions; a caller's own `append`) count as if each was chosen when it
was made: the filter decides on whatever follows them, and they cannot be gone on with as fixed in advance.

What a promise of a larger epsilon admits counts for that epsilon: the promise for one's data is the largest ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from choral.privacy.accounting import client_level, client_noise, record_level, record_noise
from choral.privacy.accounting.events import (
    NEIGHBOURS,
    ClientRelease,
    Event,
    PlannedEvents,
    RecordEvent,
    ReleasePlan,
    Search,
)
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.errors import BudgetExceededError
from choral.privacy.ledgers.ledger import Ledger

_SLACK = 1e-3  # the share of a budget that a calibration by the filter may leave unused

Segments = tuple[tuple[ReleasePlan | None, tuple[Event, ...]], ...]


def fixed_cost(events: Sequence[Event], delta: float, neighbours: str = NEIGHBOURS) -> float:
    """Return the epsilon of `events`, all of one unit, if their parameters and their number were fixed in advance."""
    clients = [event for event in events if isinstance(event, ClientRelease)]
    if clients:
        return client_level.epsilon(clients, delta)
    records = [event for event in events if not isinstance(event, ClientRelease)]
    return record_level.epsilon(records, delta, neighbours=neighbours)


def left_of(plan: ReleasePlan, events: Sequence[Event]) -> list[int] | None:
    """Return how many events of each part are still to come; None if `events` are not of this plan alone."""
    left = [part.times for part in plan.parts]
    for event in events:
        if isinstance(event, ClientRelease) and event.settles:
            continue  # in the place of the one before it
        for place, part in enumerate(plan.parts):
            if left[place] and part.covers(event):
                left[place] -= 1
                break
        else:
            return None
    return left


@dataclass(frozen=True)
class LedgerState:
    """What a ledger held at a moment.

    before: all releases. first: the first plan in full, or the first event where there is no plan. alone: that nothing
    but that plan is on the ledger. latest, left: the latest plan, if the events after it are all its own, and how many
    of each part are still to come. promised: the largest epsilon of a plan; 0 without. earlier: what the latest
    plan was made on; None without a plan.
    """

    before: tuple[Event, ...]
    first: tuple[Event, ...]
    alone: bool
    latest: ReleasePlan | None
    left: tuple[int, ...]
    promised: float
    earlier: LedgerState | None

    @classmethod
    def of(cls, ledger: Ledger) -> LedgerState:
        """Read it. Raises: LedgerError."""
        return cls._of(ledger.segments)

    @classmethod
    def _of(cls, segments: Segments) -> LedgerState:
        before = tuple(event for _, events in segments for event in events)
        if not segments:
            return cls((), (), True, None, (), 0.0, None)
        plan, events = segments[0]
        covered = left_of(plan, events) if plan else None
        latest, latest_events = segments[-1]
        left = left_of(latest, latest_events) if latest else None
        return cls(
            before=before,
            first=plan.whole if plan else before[:1],
            alone=len(segments) == 1 and covered is not None,
            latest=latest if left is not None else None,
            left=tuple(left or ()),
            promised=max((made.epsilon for made, _ in segments if made), default=0.0),
            earlier=cls._of(segments[:-1]) if latest else None,
        )

    def admits(self, rule: PrivacyFilter, more: Sequence[Event]) -> bool:
        """Whether a further plan of the events `more` may be added, by rule 2."""
        return rule.admits(self.first) and rule.admits((*self.before, *more))


def guarantee(ledger: Ledger) -> float | None:
    """Return the epsilon, at the ledger's delta, that holds whoever chose when to stop and what to train next.

    Of one plan the cost of the whole of it; of several the largest promise that they were made for, if the filter of
    that promise admits them all, which is computed again here. None where neither is so: events that no plan announced
    are on the ledger, as those of older versions, or more than was planned.
    """
    state = LedgerState.of(ledger)
    if not state.before or ledger.delta is None:
        return 0.0
    if state.alone:
        return fixed_cost(state.first, ledger.delta, ledger.neighbours)
    if state.latest is None or state.promised == 0.0:
        return None
    return state.promised if state.admits(PrivacyFilter(state.promised, ledger.delta, ledger.neighbours), ()) else None


@dataclass(frozen=True)
class RemainingBudget:
    """What one more plan may cost under a promise of (epsilon, delta), on top of a ledger as it stood.

    beside: what else is of that plan, comes before the rest, and is fixed together with it.
    """

    epsilon: float
    delta: float
    state: LedgerState
    neighbours: str = NEIGHBOURS
    beside: tuple[PlannedEvents, ...] = ()

    @classmethod
    def on(cls, ledger: Ledger, epsilon: float, delta: float) -> RemainingBudget:
        """What is left on `ledger` now, for its neighbours. Raises: LedgerError."""
        return cls(epsilon, delta, LedgerState.of(ledger), ledger.neighbours)

    @property
    def rule(self) -> PrivacyFilter:
        """The filter of this promise."""
        return PrivacyFilter(self.epsilon, self.delta, self.neighbours)

    def fixed_cost(self, events: Sequence[Event]) -> float:
        """Return what `events` cost as fixed in advance."""
        return fixed_cost(events, self.delta, self.neighbours)

    @property
    def empty(self) -> bool:
        """Whether nothing was released yet: the plan is the first, and is priced as fixed."""
        return not self.state.before

    def unfinished(self) -> tuple[tuple[PlannedEvents, int], ...]:
        """Return the parts of the latest plan that passes are left of, if it was made for this promise, and how many.

        Nothing, if that plan, or what is left of it, is not within the promise after all.
        """
        state = self.state
        if state.latest is None or state.latest.epsilon != self.epsilon:
            return ()
        if state.alone and not self.fixed_cost(state.first) <= self.epsilon:
            return ()
        if not state.alone and not state.admits(self.rule, self._rest()):
            return ()
        return tuple((part, left) for part, left in zip(state.latest.parts, state.left, strict=True) if left)

    def before_latest(self) -> RemainingBudget:
        """What the latest plan was made on: the same ledger without it and what came after."""
        return RemainingBudget(self.epsilon, self.delta, self.state.earlier or self.state, self.neighbours)

    def plan(self, event: Event, times: int) -> ReleasePlan:
        """Return the plan of so many of this event, to be written in front of the first."""
        return ReleasePlan(epsilon=self.epsilon, parts=(*self.beside, PlannedEvents(event=event, times=times)))

    def noise_multiplier(self, sample_rate: float, steps: int, *, slack: float = _SLACK) -> float:
        """Return the smallest noise multiplier with which `steps` steps more fit in.

        Raises: ConfigError (a number out of range), BudgetExceededError (nothing does).
        """
        self._refuse_if_full()
        return record_noise.noise_multiplier(
            self.epsilon,
            self.delta,
            sample_rate,
            steps,
            self._records(),
            slack=slack,
            neighbours=self.neighbours,
            fixed=self.empty,
        )

    def search_noise(self, search: Callable[[float], Search]) -> float:
        """Return the smallest noise multiplier z with which the search `search(z)` fits in. Raises: the same."""
        self._refuse_if_full()
        return record_noise.search_noise(self.epsilon, self.delta, search, self._records(), neighbours=self.neighbours)

    def client_ratio(self, release: Callable[[float], ClientRelease], rounds: int) -> float:
        """Return the smallest ratio z with which `rounds` of `release(z)` fit in; see client_noise.calibrate."""
        self._refuse_if_full()
        before = [event for event in self.state.before if isinstance(event, ClientRelease)]
        return client_noise.calibrate(self.epsilon, self.delta, release, rounds, before)

    def check(self, more: Sequence[Event]) -> None:
        """Raise BudgetExceededError unless the events `more`, as one further plan, fit in."""
        if self.empty:
            total = self.fixed_cost(more)
        else:
            self._refuse_if_full()
            total = self.rule.cost((*self.state.before, *more))
        if not total <= self.epsilon:
            raise BudgetExceededError(
                f"these releases would come to epsilon {total:.4g} in all, more than the {self.epsilon:g} promised",
                hint=self._hint(),
            )

    def _rest(self) -> tuple[Event, ...]:
        latest, left = self.state.latest, self.state.left
        if latest is None:
            return ()
        parts = [PlannedEvents(event=p.event, times=n) for p, n in zip(latest.parts, left, strict=True) if n]
        return tuple(event for part in parts for event in part.whole)

    def _records(self) -> tuple[RecordEvent, ...]:
        beside = (event for part in self.beside for event in part.whole)
        return tuple(event for event in (*self.state.before, *beside) if not isinstance(event, ClientRelease))

    def _refuse_if_full(self) -> None:
        """Raise BudgetExceededError if the filter admits no more, however little it costs."""
        record_level.check_target(self.epsilon, self.delta)
        rule = self.rule
        for what, events in (("the first plan alone", self.state.first), ("all of it", self.state.before)):
            counted = rule.cost(events)
            if counted >= (1.0 - 2.0 * _SLACK) * self.epsilon:
                spent = self.fixed_cost(self.state.before)
                raise BudgetExceededError(
                    f"the budget epsilon={self.epsilon:g} at delta={self.delta:g} is spent: {spent:.6g} so far; a "
                    f"filter counts what is chosen after something was seen, and there {what} comes to {counted:.6g}",
                    hint=self._hint(),
                )

    def _hint(self) -> str:
        latest, left = self.state.latest, self.state.left
        if latest is not None and any(left) and latest.epsilon == self.epsilon:
            passes = ", ".join(str(number) for number in left if number)
            return (
                f"{passes} more are left of an earlier plan, with the noise that they were planned with: the same "
                "batches (or clients), for no more passes (or rounds) than those."
            )
        return (
            "This data may not be used again under this promise; a larger epsilon is a weaker promise. To train again "
            "later, promise less the first time."
        )


def passes_left(ledger: Ledger, epsilon: float) -> int | None:
    """Return how many passes are left of the latest plan, if it was made for this epsilon; None without such a plan."""
    state = LedgerState.of(ledger)
    if state.latest is None or state.latest.epsilon != epsilon:
        return None
    return sum(state.left)
