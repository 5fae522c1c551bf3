"""Both drivers of a secure sum in a loop: all parties and the server in this process, over no network.

What passes between them is bytes, counted and shown to whoever watches (:mod:`choral.protocols.tap`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from choral.protocols.driver import Agreed, NeedsVector, PartyDriver, RoundTerms, ServerDriver, Traffic, Trip
from choral.protocols.errors import SpecError, StateUsedError
from choral.protocols.interface import IntVector, Losses, Step, SumResult, SumSpec
from choral.protocols.plain import check_submission
from choral.protocols.tap import show

if TYPE_CHECKING:
    import torch

NO_TRAINING = RoundTerms()


class DriverSession:
    """See :class:`choral.protocols.interface.SumSession`; kinds of sums add what they say of themselves."""

    def __init__(self, spec: SumSpec, parties: Mapping[str, PartyDriver], server: ServerDriver) -> None:
        """Open the session, of all the parties. Raises: what the parties refuse, and what ends an opening."""
        self.spec = spec
        self.counter = ByteCounter()
        self.number = 0
        self.parties: Mapping[str, PartyDriver] = dict(parties)
        self.server = server
        for trip in server.open():
            for party, raw in trip.outbox.items():
                self.deliver(party, raw, trip)

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> DriverRound:
        """Keys and shares of a fresh round; an unfinished earlier round is lost.

        lost: as in the interface. Keys that came with the round before are there whoever drops out at "keys" now.
        terms: what the round is computed from; None, a sum without training.
        Raises: SpecError; TooFewSurvivorsError when too few advertise or share.
        """
        losses = Losses(lost, self.spec.parties)
        self.between_rounds()
        return DriverRound(self, losses, NO_TRAINING if terms is None else terms)

    def agreed(self, party: str) -> Agreed | None:
        """What a party saw of its latest round, which may be an earlier one than the session's."""
        return self.parties[party].agreed()

    def between_rounds(self) -> None:
        """What is of no use in the next round is forgotten here."""

    def deliver(self, party: str, raw: bytes, trip: Trip) -> NeedsVector | None:
        """Hand a message over, and the answer back, unless that needs a vector. Raises: what either side refuses."""
        self.counter.down(party, raw)
        answer = self.parties[party].handle(raw)
        if isinstance(answer, NeedsVector):
            return answer
        self.send(party, answer, trip)
        return None

    def send(self, party: str, answer: tuple[bytes, ...], trip: Trip) -> None:
        """Raises: what the server refuses."""
        for raw in answer:
            trip.receive(party, self.counter.up(party, raw))
            if party in trip.faults:
                raise trip.faults[party]


class DriverRound:
    """See :class:`choral.protocols.interface.SumRound`. The server holds one vector, whatever the number of parties."""

    def __init__(self, session: DriverSession, losses: Losses, terms: RoundTerms) -> None:
        self._session, self._losses = session, losses
        session.number += 1
        self.number = session.number
        self._trips: Iterator[Trip] = session.server.round(terms)
        self._sent: dict[str, bool] = {}
        self._answers: dict[str, tuple[bytes, ...]] = {}
        self._needs: dict[str, NeedsVector | None] = {}
        self._finished = False
        self._uploading = self._until_vectors()

    def _until_vectors(self) -> Trip:
        for trip in self._trips:
            if trip.step == "vector":  # who drops out at its vector still hears what it is sent before it
                for party, raw in trip.outbox.items():
                    self._needs[party] = self._session.deliver(party, raw, trip)
                return trip
            self._pass(trip)
        raise SpecError("a round without a trip for vectors")

    def _pass(self, trip: Trip) -> None:
        """Deliver to whoever is there to take the step that is asked for, and take the answers."""
        for party, raw in trip.outbox.items():
            if self._losses.takes(party, trip.step):  # type: ignore[arg-type]
                self._session.deliver(party, raw, trip)

    def needs(self, party: str) -> NeedsVector | None:
        """What the party was asked to compute its vector from."""
        return self._needs.get(party)

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Have the party send its vector.

        Raises: SpecError for an unknown party; StateUsedError the second time, or when a later round has begun;
        InputError for another vector than agreed on, after which the party may submit a right one. One that broke off
        on its way is sent again as it was.
        """
        self.check(party)
        if party not in self._answers:
            self._answers[party] = self._session.parties[party].supply(vector)
        self._session.send(party, self._answers[party], self._uploading)
        self._answers[party] = ()
        self._sent[party] = True

    def check(self, party: str) -> None:
        """Raises: SpecError, StateUsedError: what ``submit`` would raise whatever the vector."""
        self._check_current()
        check_submission(party, self._session.spec, self._sent, self._losses, finished=self._finished)

    def finish(self) -> SumResult:
        """Recover from the dropouts and open the sum.

        Raises: TooFewSurvivorsError, naming the counts and the missing; StateUsedError the second time.
        """
        self.run_out()
        session = self._session
        if session.server.result is None:
            raise SpecError("a round without a result")
        up, down = session.counter.take(session.spec.parties)
        return replace(session.server.result, bytes_up=up, bytes_down=down)

    def run_out(self) -> None:
        """The trips that are left, once."""
        self._check_current()
        if self._finished:
            raise StateUsedError("this round is finished")
        self._finished = True
        for trip in self._trips:
            self._pass(trip)

    def _check_current(self) -> None:
        if self.number != self._session.number:
            raise StateUsedError(f"round {self.number} ended when round {self._session.number} began")


class ByteCounter(Traffic):
    """Counts what passes, refused or not, and shows it to whoever watches (:mod:`choral.protocols.tap`)."""

    def up(self, party: str, raw: bytes) -> bytes:
        show("up", party, raw)
        return super().up(party, raw)

    def down(self, party: str, raw: bytes) -> None:
        show("down", party, raw)
        super().down(party, raw)
