"""Who of the sites is there: jobs are offered to those who come, messages of sums are passed to those who took it.

Every wait has an end, and while it lasts it is said who is missing. A site that does not answer in time, or is away for
longer than a while, is out of the round, and is not asked again before the next one. A site that was started anew knows
of no job: it is offered again, and is in the next round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from choral.errors import ConfigError
from choral.network.errors import OfferError, TransportError
from choral.network.host.messages import (
    EndJob,
    ExchangeEnded,
    FromSite,
    JobOver,
    JobRefused,
    JobTaken,
    JobUnknown,
    ProposeJob,
    RunSigned,
    SignRun,
    StepTaken,
    StillBusy,
    TakeStep,
    TellAgain,
    largest_reply,
    read_reply,
    written,
)
from choral.network.site.offer import Offer
from choral.protocols.driver import Trip
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.tap import show
from choral.trainers.engines.exchange_messages import Told

Say = Callable[[str], None]
_LOOK_AGAIN = 1.0  # seconds
_OFFER_AGAIN = 15.0  # to a site that refused: somebody may have approved


class Carrier(Protocol):
    """What carries requests to sites by name, and their replies (`BlockingHub`)."""

    @property
    def connected(self) -> frozenset[str]: ...

    def calls(self, name: str) -> int:
        """How often the site has connected."""
        ...

    def wait_for(self, names: Iterable[str], *, timeout: float, count: int | None = None) -> frozenset[str]: ...

    def replies(
        self,
        outbox: Mapping[str, bytes],
        *,
        timeout: float,
        reply_limit: int,
        away: float | None = None,
        waiting: Callable[[tuple[str, ...]], None] | None = None,
    ) -> Generator[tuple[str, memoryview | TransportError]]:
        """Ask all at once; each one's reply, or the error that it had, in the order of `outbox`, as they come."""
        ...


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long is waited for whom, in seconds. Raises: ConfigError for what is no time, or a quorum below 2."""

    sites: float = 600.0
    """For all sites to come and take the job; then for a quorum, if one is set."""
    quorum: int | None = None
    """With how many sites a round may begin when that time is over; None takes no fewer than all at the beginning, and
    afterwards as many as the secure sum needs."""
    training: float = 3600.0
    """For the sites' vectors: they train before they answer."""
    step: float = 60.0
    """For every other answer."""
    away: float = 20.0
    """For a site whose connection broke to come back."""

    def __post_init__(self) -> None:
        for name in ("sites", "training", "step", "away"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"serve.{name} is {getattr(self, name)}, expected seconds above 0")
        if self.quorum is not None and self.quorum < 2:
            raise ConfigError(f"serve.quorum is {self.quorum}, expected at least 2 sites")


@dataclass
class Sites:
    """See the module. length: coordinates of the longest vector. say: is told who is missing, and who came.

    there: who took the job and answers. out: who is out of the round at hand, and why. restarted: who was started anew
    since the round before. strange: who could not go on with an open session. past: how the latest exchange of each
    ended.
    """

    carrier: Carrier
    offer: Offer
    waits: Waits
    say: Say
    length: int = 0
    there: set[str] = field(default_factory=set)
    out: dict[str, str] = field(default_factory=dict)
    restarted: set[str] = field(default_factory=set)
    strange: set[str] = field(default_factory=set)
    past: dict[str, ExchangeEnded] = field(default_factory=dict)
    _refused: dict[str, float] = field(default_factory=dict)
    _made: dict[str, bytes] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)
    _waiting: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return self.offer.parties

    @property
    def present(self) -> tuple[str, ...]:
        """Who is in the round at hand, as far as is known."""
        return tuple(name for name in self.names if name in self.there and name not in self.out)

    # ------------------------------------------------------------------------------------------------------- who comes

    def begin_round(self, *, fewest: int, all_of_them: bool) -> None:
        """Take in who has come, and wait until there are enough: all at the beginning, later at least ``fewest``.

        Raises: TooFewSurvivorsError if they have not come when the time is over.
        """
        end = time.monotonic() + self.waits.sites
        wanted = len(self.names) if all_of_them else fewest
        self._take_in()
        while len(self._here()) < wanted:
            left = end - time.monotonic()
            missing = [name for name in self.names if name not in self._here()]
            if left <= 0:
                break
            self._say_waiting(missing, left)
            unknown = [name for name in missing if name not in self.carrier.connected]
            pause = min(_LOOK_AGAIN, left)
            if unknown:
                self.carrier.wait_for(unknown, timeout=pause, count=1)
            else:
                time.sleep(pause)
            self._offer()
        self._waiting = ""
        here = self._here()
        needed = min(wanted, self.waits.quorum or wanted) if all_of_them else fewest
        if len(here) < max(2, needed):
            missing = [name for name in self.names if name not in here]
            raise TooFewSurvivorsError(
                f"{len(here)} of {len(self.names)} sites took the job within {self.waits.sites:g} s, {needed} are"
                f" needed; missing: {', '.join(map(self._why, missing))}",
                survivors=len(here),
                needed=needed,
                missing=tuple(missing),
                hint="start them with `choral join`, or have them approve the job, and go on with --resume",
            )
        for name in sorted(self.there - here):
            self.leave(name, "is not connected")

    def _take_in(self) -> None:
        self.out.clear()
        for name in sorted(self.there):  # who has connected again may have been started anew
            if self.carrier.calls(name) != self._calls.get(name):
                self.there.discard(name)
        self._offer()

    def _here(self) -> set[str]:
        return self.there & self.carrier.connected

    def _why(self, name: str) -> str:
        return f"{name} (refused)" if name in self._refused else name

    def _say_waiting(self, missing: list[str], left: float) -> None:
        said = f"waiting for {', '.join(map(self._why, missing))}"
        if said != self._waiting:
            self._waiting = said
            self.say(f"{said}, at most {left:.0f} s")

    def _offer(self) -> None:
        """To who is connected and has not taken the job."""
        now, connected = time.monotonic(), self.carrier.connected
        asked = [
            name
            for name in self.names
            if name in connected and name not in self.there and now >= self._refused.get(name, 0.0)
        ]
        if not asked:
            return
        request, calls = written(ProposeJob(self.offer.message())), {name: self.carrier.calls(name) for name in asked}
        replies = self._ask(dict.fromkeys(asked, request), self.waits.step)
        for name, reply in replies.items():
            if isinstance(reply, JobTaken) and reply.job == self.offer.digest:
                self._welcome(name, reply.made)
                self._calls[name] = calls[name]
            elif isinstance(reply, JobRefused):
                if name not in self._refused:
                    self.say(f"{name} refused the job; who runs it knows why")
                self._refused[name] = time.monotonic() + _OFFER_AGAIN

    def _welcome(self, name: str, made: bytes) -> None:
        known = self._made.get(name)
        self._made[name] = made
        self.there.add(name)
        self.out.pop(name, None)
        self._refused.pop(name, None)
        if known is None:
            self.say(f"{name} took the job ({len(self.there)} of {len(self.names)})")
        elif known != made:
            self.restarted.add(name)
            self.say(f"{name} is back, and goes on")

    def leave(self, name: str, why: str) -> None:
        """Out of the round at hand."""
        if name not in self.out:
            self.out[name] = why
            self.say(f"going on without {name}: {why}")

    # -------------------------------------------------------------------------------------------------------- messages

    def pass_on(self, channel: str, trip: Trip, told: Told | None = None, fresh: set[str] | None = None) -> None:
        """Deliver a trip's messages to who is in the round, and take the answers.

        told: the exchange; fresh: to whom it must still be told, who are taken from it.
        """
        seconds = self.waits.training if trip.step == "vector" else self.waits.step
        outbox = {name: raw for name, raw in trip.outbox.items() if name in self.present}
        for name, raw in outbox.items():
            show("down", name, raw)
        tell = {name for name in outbox if fresh is not None and name in fresh}
        message = told.message() if told is not None and tell else b""
        requests = {
            name: self._step(channel, raw, message if name in tell else b"", name) for name, raw in outbox.items()
        }
        if fresh is not None:
            fresh -= tell
        again = []
        with closing(self._replies(requests, seconds)) as replies:
            for name, reply in replies:  # the first ones are taken while others are still at work
                if isinstance(reply, TellAgain) and told is not None:
                    again.append(name)
                else:
                    self._take(name, reply, trip)
        if again and told is not None:
            whole = told.message(whole=True)
            for name, reply in self._ask(
                {name: self._step(channel, outbox[name], whole, name) for name in again}, seconds
            ).items():
                self._take(name, reply, trip)

    def _step(self, channel: str, raw: bytes, told: bytes, name: str) -> bytes:
        return written(TakeStep(self.offer.digest, channel, raw, told, self.past.get(name) if told else None))

    def _take(self, name: str, reply: FromSite, trip: Trip) -> None:
        if isinstance(reply, JobUnknown):
            self.there.discard(name)
            self.leave(name, "it was started anew")
            return
        if isinstance(reply, StillBusy):
            self.leave(name, "it is still at work for an earlier round")
            return
        if not isinstance(reply, StepTaken):
            self.strange.add(name)
            self.leave(name, "refused")
            return
        for part in reply.parts:
            show("up", name, part)
            trip.receive(name, part)
        if name in trip.faults:
            self.leave(name, f"its message was refused here ({trip.faults[name]})")
        elif name in trip.waiting:
            self.leave(name, "it sent no vector" if trip.step == "vector" else "it had no answer")

    def end(self, model: str, completed: int) -> dict[str, JobOver]:
        """Tell those who are there, or come within a while, that no more is coming; others forget it by themselves.

        model: digest of the one that came of the last round. Returns what those who answer have of the job's receipts.
        """
        if missing := [name for name in self.names if name not in self.carrier.connected]:
            self.carrier.wait_for(missing, timeout=self.waits.away)
        self._take_in()
        ended = {name: EndJob(self.offer.digest, self.past.get(name), completed, model) for name in self._here()}
        replies = self._ask({name: written(each) for name, each in ended.items()}, self.waits.step)
        return {name: reply for name, reply in replies.items() if isinstance(reply, JobOver)}

    def sign(self, manifest: bytes, names: Iterable[str]) -> dict[str, str]:
        """The signatures of those who sign it. Why another does not, its own log says."""
        request = written(SignRun(self.offer.digest, manifest))
        replies = self._ask({name: request for name in names if name in self.carrier.connected}, self.waits.step)
        return {name: reply.signature for name, reply in replies.items() if isinstance(reply, RunSigned)}

    def _ask(self, requests: Mapping[str, bytes], seconds: float) -> dict[str, FromSite]:
        """The replies of those who have one; the others are out."""
        return dict(self._replies(requests, seconds))

    def _replies(self, requests: Mapping[str, bytes], seconds: float) -> Generator[tuple[str, FromSite]]:
        """As `_ask`, as they come."""
        if not requests:
            return
        limit = largest_reply(self.length, len(self.names))
        found = self.carrier.replies(
            requests,
            timeout=seconds,
            reply_limit=limit,
            away=min(self.waits.away, seconds),
            waiting=lambda names: self.say(f"waiting for {', '.join(names)}"),
        )
        with closing(found):
            for name, raw in found:
                try:
                    if isinstance(raw, TransportError):
                        raise raw
                    reply = read_reply(raw, limit=limit)
                except (TransportError, OfferError) as error:
                    self.leave(name, str(error).removeprefix(f"{name}: "))
                else:
                    yield name, reply
