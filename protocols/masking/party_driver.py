"""A party of the masked sum behind one door: every message goes into ``handle``, and out comes what to send back.

    from the server        state before    step         answer                     state after
    SumSetup               -               join         Hello                      Joining
    Hellos                 Joining         reveal       Reveal                     Revealing
    Reveals                Revealing       enter        -                          Member
    Begin                  Member          advertise    Advertise                  Advertised
    Roster                 Advertised      share        DealtShares                SharesSent
    Deliveries             SharesSent      receive      NeedsVector, then Upload   Ready, then Uploaded
    Survivors              Uploaded        confirm      Confirm                    Confirmed
    Confirmations          Confirmed       unmask       Unmask                     -

Threat model: that of :mod:`choral.protocols.masking.party`, whose states do all that is secret; the driver decides
which of them a message may reach. A message of another session, another round, or a kind that is not waited for is
refused by name and spends no state, so that what a network has delayed, repeated or reordered costs nothing; one that
is waited for spends its state, whatever is in it. The same bytes get the same answer, from a cache of what was sent,
and no step is ever run twice.

What is stored, ahead. ``public_state`` (the setup, the digest of the session, how many sessions the identity has
joined, the last round that may have been answered) is handed to ``store`` *before* any message leaves that depends on
it. A party that restarts from it has no secret of any round: it answers the next Begin, and none that it may have
answered before. Nothing that is stored helps who steals it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from choral.protocols.crypto.keys import SigningKey
from choral.protocols.crypto.single_use import Current
from choral.protocols.driver import Agreed, Answer, NeedsVector, Replies, used
from choral.protocols.errors import SERVER, FaultyServerError, MessageError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.graph import neighbours_of
from choral.protocols.masking.membership import Membership, agreed_of
from choral.protocols.masking.party import Joining, Member, Revealing, join
from choral.protocols.masking.party_round import Advertised, Confirmed, Ready, SharesSent, Uploaded
from choral.protocols.masking.policy import PartyContext, Policy
from choral.protocols.stored_state import read_stored, setup_of, stored
from choral.protocols.wire_format import LAST_ROUND, claims_to_be, read

MOST_JOINED = 1024
"""Setups that a party remembers to have joined: beyond so many, an old one that comes late is joined anew."""


@dataclass(repr=False)
class Round:
    """The round begun last. state: the next step's, None once one has failed or all is done. answer: to its Begin."""

    begin: messages.Begin
    begun: bytes
    state: Any  # Advertised, SharesSent, Ready, Uploaded or Confirmed, of the masked sum; or None
    answer: Answer
    asked: bytes = b""  # the digest of the message that asked for the vector
    bitmap: bytes = b""  # the set of survivors that was shown here
    confirmed: tuple[messages.Confirmation, ...] = ()  # by others, of just that set; verified


class MaskedPartyDriver:
    """See :class:`choral.protocols.driver.PartyDriver`.

    Raises: SpecError for a stored state of something else; PolicyError where its setup is now weaker than the policy.
    """

    known: Any = messages.ToParty  # whatever the server may send in this protocol
    further: Any = None  # what refuses a setup for more than the policy says: see `join`
    waits: Any = Ready  # the state that takes a vector
    # What opens a session, for which state; and whether it may come again when the session is open.
    opens: ClassVar[dict[Any, Any]] = {messages.Hellos: (Joining, False), messages.Reveals: (Revealing, True)}

    def __init__(self, context: PartyContext) -> None:
        identity, self._purpose = context.identity, context.purpose
        self.name, self.policy = context.name, context.policy
        self._identity, self._randomness, self._store = identity, context.randomness, context.store
        self._sessions = identity.sessions(context.purpose)
        self._replies = Replies(kept=context.repeats)
        self._joined: dict[bytes, None] = {}
        self._setup: messages.SumSetup | None = None
        self._raw_setup, self._longest, self._alike = b"", 0, (messages.SumSetup, *self.opens)
        self._opening: Any = None  # the state of a session that is being opened
        self._membership: Membership | None = None
        self._member: Member | None = None
        self._early: tuple[int, Advertised, bytes] | None = None
        self._round: Round | None = None
        self._last = 0
        if context.state is not None:
            self._restore(context.state)

    # ------------------------------------------------------------------------------------------------- what is stored

    def public_state(self) -> bytes:
        """What a restarted party goes on from; no secret is in it."""
        session, setup = b"", b""
        if self._membership is not None:
            session, setup = self._membership.session, self._raw_setup
        return stored(self.name, self._purpose, self._sessions.last, setup, session, self._last)

    def _save(self) -> None:
        if self._store is not None:
            self._store(self.public_state())

    def _restore(self, raw: bytes) -> None:
        """All of it is checked before any session of the identity ends."""
        state, setup = read_stored(raw, self.name, self._purpose), None
        if state.session:
            setup = setup_of(state, self.known)
            policy = self._policy_for(setup)
            if self.further is not None:
                self.further(setup, policy)
            policy.check(setup, self.name)
        current = Current(self._sessions, after=state.sessions)  # what another driver went on from it is dead
        if setup is not None:
            self._enter(setup, state.setup, state.session, current, state.last)
            self._joined[signing.setup_digest(state.setup)] = None
        self._save()

    def _enter(self, setup: messages.SumSetup, raw: bytes, session: bytes, current: Current, last: int) -> None:
        index = setup.roster.index(self.name)
        around = neighbours_of(index, len(setup.roster), setup.neighbours, signing.graph_seed(session))
        policy = self._policy_for(setup)
        membership = Membership(setup, session, index, SigningKey(self._identity.seed), policy, around, current)
        self._hold(setup, raw)
        self._membership, self._member, self._last = membership, Member((membership, last)), last

    # ------------------------------------------------------------------------------------------------------- messages

    def handle(self, raw: bytes) -> Answer:
        """See :class:`choral.protocols.driver.PartyDriver`.

        Raises: MessageError; PolicyError for a setup that is not accepted; FaultyServerError for a message of another
        session or round, two models in one round, or a round that was answered before; StateUsedError for a step that
        was taken, or whose session is dead; what the steps raise (:mod:`choral.protocols.masking.party`).
        """
        if not isinstance(raw, bytes):
            raise MessageError("the server", f"expected a message as bytes, got a {type(raw).__name__}")
        self._longest = self._longest or self._limit()
        if len(raw) > self._longest:
            raise MessageError("the server", f"expected a message of at most {self._longest} bytes, got {len(raw)}")
        key = Replies.key(raw)
        if (known := self._replies.get(key)) is not None:
            self._check_live()
            return known
        answer: Answer = ()
        message = self._read(raw)
        if isinstance(message, messages.Bundle):
            for part in message.parts:
                answer = self._take(self._read(part), part, key)
        else:
            answer = self._take(message, raw, key)
        self._replies.put(key, answer)
        return answer

    def _read(self, raw: bytes) -> Any:
        """What opens a session comes to all parties alike, and those of this process read it once."""
        message = partial(read, self.known, raw, sender=SERVER, limit=len(raw))
        alike = claims_to_be(self._alike, raw)
        return self.policy.signatures.once(("read", self.known, raw), message) if alike else message()

    def _limit(self) -> int:
        """No message that this party may be sent is longer."""
        limit, setup = messages.limit, self._setup
        most = limit(messages.SumSetup, len(self.policy.directory))
        if setup is None:
            return most
        n, k = len(setup.roster), setup.neighbours
        parts = limit(messages.Reveals, n) + limit(messages.Begin) + limit(messages.Roster, k)
        kinds = (messages.Deliveries, messages.Confirmations)
        return max(most, limit(messages.Bundle, parts), limit(messages.Hellos, n), *(limit(kind, k) for kind in kinds))

    def _take(self, message: messages.ToParty, raw: bytes, key: bytes) -> Answer:
        """One message, its kind deciding which state it is for."""
        if isinstance(message, messages.SumSetup):
            return self._join(message, raw)
        if type(message) in self.opens:
            return self._open(message, raw)
        if isinstance(message, messages.Bundle):
            raise MessageError("the server", "a bundle holds no bundle")
        member = self._in_session(message)
        if isinstance(message, messages.Begin):
            return self._begin(message, raw, member)
        return self._step(self._current_round(message), message, raw, key)

    def _check_live(self) -> None:
        if self._membership is not None:
            self._membership.current.check_live()

    def _in_session(self, message: Any) -> Membership:
        kind = type(message).__name__
        if self._membership is None:
            raise FaultyServerError(f"it sent its {kind} before the session was open to this party")
        if message.session != self._membership.id:
            raise FaultyServerError(f"the {kind} is of another session")
        self._membership.current.check_live()
        return self._membership

    def _current_round(self, message: Any) -> Round:
        kind, now = type(message).__name__, self._round
        if now is None:
            raise FaultyServerError(f"it sent its {kind} of round {message.round}, which was not begun")
        if message.round != now.begin.round:
            raise FaultyServerError(f"the {kind} is of round {message.round}, not {now.begin.round}")
        return now

    # -------------------------------------------------------------------------------------------------------- opening

    def _policy_for(self, setup: messages.SumSetup) -> Policy:  # noqa: ARG002
        """What is accepted of this setup; never taken from it."""
        return self.policy

    def _hold(self, setup: messages.SumSetup, raw: bytes) -> None:
        self._setup, self._raw_setup, self._longest = setup, raw, 0
        self._opening = self._membership = self._member = self._early = self._round = None
        self._last = 0

    def _nonce(self, size: int) -> bytes:
        """What this party puts into the session's digest: fresh, and not to be guessed before it is shown."""
        return self._randomness(size)

    def _join(self, setup: messages.SumSetup, raw: bytes) -> Answer:
        """A session that is joined ends the one before it, for good; so none is joined twice, whatever comes late."""
        digest = signing.setup_digest(raw)
        if digest in self._joined:
            raise used("this party has joined the session of that setup before, and joins it once")
        joining, hello = join(
            raw,
            name=self.name,
            identity=self._identity.seed,
            policy=self._policy_for(setup),
            randomness=self._nonce,
            sessions=self._sessions,
            known=self.known,
            further=self.further,
        )
        self._replies.forget()
        self._hold(setup, raw)
        self._opening = joining
        self._save()
        self._joined[digest] = None
        if len(self._joined) > MOST_JOINED:
            del self._joined[next(iter(self._joined))]
        return (hello,)

    def _open(self, message: Any, raw: bytes) -> Answer:
        kind, setup = type(message), self._setup
        if setup is None or message.session != setup.session:
            raise FaultyServerError(f"its {kind.__name__} is of another session")
        waiting, again = self.opens[kind]
        if isinstance(opening := self._opening, waiting):
            self._opening = None
            return self._opened(setup, opening, raw)
        if again and self._membership is not None:
            return ()  # until a party is heard in the open session, each Begin brings it along
        raise used(f"its {kind.__name__} was not waited for: that step was taken")

    def _opened(self, setup: messages.SumSetup, opening: Any, raw: bytes) -> Answer:  # noqa: ARG002
        """What the state that waited for this message answers; the state after it is kept."""
        if isinstance(opening, Joining):
            self._opening, reveal = opening.reveal(raw)
            return (reveal,)
        member = opening.enter(raw)
        (membership, _), *_ = tuple(member._content)
        self._membership, self._member = membership, member
        self._save()
        return ()

    # -------------------------------------------------------------------------------------------------------- a round

    def _begin(self, begin: messages.Begin, raw: bytes, member: Membership) -> Answer:
        now, signed = self._round, member.setup.terms
        if now is not None and begin.round == now.begin.round:
            if begin != now.begin:
                raise FaultyServerError(f"it shows two models in round {begin.round}, or other terms")
            return now.answer
        if begin.round <= self._last and not self._is_prepared(begin.round):
            raise FaultyServerError(f"asked for round {begin.round} after round {self._last}")
        if signed is not None and begin.terms != signed:
            raise FaultyServerError(
                f"the training terms of round {begin.round} are not those that the session was signed with",
                hint="open a session for the new terms, which each party may then refuse",
            )
        self._replies.forget()
        self._round = None
        state, answer = self._answer(begin)
        self._early = None
        self._round = Round(begin, signing.begun(raw), state, answer)
        return answer

    def _is_prepared(self, number: int) -> bool:
        """Whether what this party sent ahead is of that round, which it has not answered yet."""
        return self._early is not None and self._early[0] == number

    def _answer(self, begin: messages.Begin) -> tuple[Any, Answer]:
        """What a new Begin leads to: the round's first state, and what is answered."""
        advertised, advertise = self._advertise(begin.round)
        return advertised, (advertise,)

    def _advertise(self, number: int) -> tuple[Advertised, bytes]:
        """This party's keys for a round; once for each. That it may have answered it is stored first."""
        if self._early is None or self._early[0] != number:
            if self._member is None:
                raise used("no session is open to this party")
            self._last = number
            self._save()
            self._member, advertised, raw = self._member.advertise(number, randomness=self._randomness)
            self._early = number, advertised, raw
        return self._early[1], self._early[2]

    def _step(self, now: Round, message: messages.ToParty, raw: bytes, key: bytes) -> Answer:
        """The state that waits for this kind of message is taken out of the round first: a step that fails is over."""
        state, begin = now.state, now.begin
        if isinstance(message, messages.Roster) and isinstance(state, Advertised):
            now.state = None
            now.state, answer = state.share(raw, randomness=self._randomness, begun=now.begun)
            return (answer,)
        if isinstance(message, messages.Deliveries) and isinstance(state, SharesSent):
            now.state = None
            now.state, now.asked = state.receive(raw), key
            return needed(begin)
        if isinstance(message, messages.Survivors) and isinstance(state, Uploaded):
            now.state = None
            now.state, answer = state.confirm(raw)
            now.bitmap = message.bitmap
            return (answer,)
        if isinstance(message, messages.Confirmations) and isinstance(state, Confirmed):
            now.state = None
            following = self._advertise(begin.round + 1)[1] if begin.round < LAST_ROUND else None
            unmask = state.unmask(raw, following=following)
            now.confirmed = message.entries
            return (unmask,)
        where = "nothing more of it" if state is None else f"another message than that, as {type(state).__name__}"
        raise used(
            f"its {type(message).__name__} of round {begin.round} was not waited for: this party expects {where}"
        )

    def supply(self, vector: Any) -> tuple[bytes, ...]:
        """See :class:`choral.protocols.driver.PartyDriver`.

        vector: int64, shape (length,), every |value| <= bound; numpy, or a torch tensor (on a GPU it is masked there).
        Raises: InputError, after which a right one may be supplied; StateUsedError where none is asked for (any more).
        """
        now, ready = self._ready()
        uploaded, upload = ready.upload(vector)
        return self._supplied(now, uploaded, (upload,))

    def _ready(self) -> tuple[Round, Any]:
        now = self._round
        if now is None or not isinstance(now.state, self.waits):
            raise used("no vector is asked for")
        return now, now.state

    def _supplied(self, now: Round, state: Any, answer: tuple[bytes, ...]) -> tuple[bytes, ...]:
        now.state = state
        self._replies.put(now.asked, answer)
        return answer

    def decline(self) -> None:
        """Sit out: the party sends no vector in this round, and answers the next one. Raises: StateUsedError."""
        now, _ = self._ready()
        self._supplied(now, None, ())

    def agreed(self) -> Agreed | None:
        """See :class:`choral.protocols.driver.PartyDriver`."""
        now, member = self._round, self._membership
        if now is None or member is None:
            return None
        return agreed_of(member, messages.encode(now.begin), now.bitmap, now.confirmed, self._raw_setup)

    def __repr__(self) -> str:
        return f"<MaskedPartyDriver of {self.name!r}>"


def needed(begin: messages.Begin) -> NeedsVector:
    """The vector of that round."""
    return NeedsVector(begin.session, begin.round, begin.exchange, begin.weights, begin.terms)
