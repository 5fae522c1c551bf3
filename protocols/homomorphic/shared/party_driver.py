"""A party of the shared-key sum behind one door: a masked sum's party, until the session is open.

    from the server    state before     step      answer                     state after
    Reveals            Revealing        meet      KeyDeal, of the dealer     ConfirmingKey, or Waiting
    KeyDeal            Waiting          receive   KeyConfirm                 ConfirmingKey
    KeyConfirmations   ConfirmingKey    enter     -                          Holder
    Begin              Holder           encrypt   NeedsVector, then Upload   Holder, EncryptedVector
    EncryptedSum       EncryptedVector  open      OpenedSum; in CKKS -       -

Nothing that is stored opens a key: a party that restarts has none, and answers again with the next session.
"""

from __future__ import annotations

from typing import Any

from choral.protocols.crypto.keys import x25519_public
from choral.protocols.driver import Answer
from choral.protocols.errors import FaultyServerError
from choral.protocols.homomorphic.shared import key_messages
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.key_messages import EncryptedSum, KeyConfirmations, KeyDeal, limit
from choral.protocols.homomorphic.shared.party import ConfirmingKey, EncryptedVector, Holder, Waiting, meet
from choral.protocols.masking import messages
from choral.protocols.masking.party import Revealing
from choral.protocols.masking.party_driver import MaskedPartyDriver, needed
from choral.protocols.masking.policy import PartyContext, Policy
from choral.protocols.stored_state import stored


class SharedPartyDriver(MaskedPartyDriver):
    """See :class:`choral.protocols.driver.PartyDriver`. floats: what is summed in CKKS; None, integers.

    total: of floats, the sum of the last round that was opened here, and whose vectors are in it.
    Raises: SpecError.
    """

    known = key_messages.ToParty
    waits = Holder
    opens = MaskedPartyDriver.opens | {KeyDeal: (Waiting, False), KeyConfirmations: (ConfirmingKey, True)}

    def __init__(self, context: PartyContext, *, floats: terms.Floats | None = None) -> None:
        self._floats, self._private = floats, b""
        self._holder: Holder | None = None
        self.total: tuple[Any, tuple[str, ...]] | None = None
        super().__init__(context)

    def public_state(self) -> bytes:
        """How many sessions the identity has joined: of a session itself nothing would be of use."""
        return stored(self.name, self._purpose, self._sessions.last)

    def _policy_for(self, setup: messages.SumSetup) -> Policy:
        return terms.agreed(self.policy, setup, self._floats)[0]

    def _nonce(self, size: int) -> bytes:
        self._private = self._randomness(size)
        return x25519_public(self._private)

    def _hold(self, setup: messages.SumSetup, raw: bytes) -> None:
        super()._hold(setup, raw)
        self._holder = None

    def _limit(self) -> int:
        setup, most = self._setup, super()._limit()
        if setup is None:
            return most
        n, plan = len(setup.roster), terms.plan_of(len(setup.roster), setup, self._floats)
        size = terms.blocks_of(plan, setup.length) * plan.parameters.full_bytes + n // 8 + 1
        parts = limit(KeyConfirmations, n) + messages.limit(messages.Begin)
        return max(most, limit(EncryptedSum, size), limit(KeyDeal, 1), messages.limit(messages.Bundle, parts))

    def _opened(self, setup: messages.SumSetup, opening: Any, raw: bytes) -> Answer:
        """The session is open once the key is handed out."""
        answer: bytes | None = None
        if isinstance(opening, Revealing):
            private, self._private = self._private, b""
            plan = terms.plan_of(len(setup.roster), setup, self._floats)
            self._opening, answer = meet(opening, raw, private, plan, randomness=self._randomness)
        elif isinstance(opening, Waiting):
            self._opening, answer = opening.receive(raw)
        elif isinstance(opening, ConfirmingKey):
            self._holder = opening.enter(raw)
            self._membership = self._holder.member
        else:
            return super()._opened(setup, opening, raw)
        return () if answer is None else (answer,)

    def _answer(self, begin: messages.Begin) -> tuple[Any, Answer]:
        """A round has no keys to show: a vector is asked for. That it may have been answered is stored first."""
        if begin.round - self._last >= terms.MAX_SKIPPED:
            raise FaultyServerError(f"asked for round {begin.round} after round {self._last}")
        self._last = begin.round
        self._save()
        return self._holder, needed(begin)

    def supply(self, vector: Any) -> tuple[bytes, ...]:
        """See :class:`choral.protocols.driver.PartyDriver`.

        vector: int64, numpy or a torch tensor; of floats float64, numpy; shape (length,), every |value| <= bound.
        Raises: InputError, after which a right one may be supplied; StateUsedError where none is asked for (any more).
        """
        now, holder = self._ready()
        self._holder, encrypted, upload = holder.encrypt(now.begin.round, vector, now.begun)
        return self._supplied(now, encrypted, (upload,))

    def _supplied(self, now: Any, state: Any, answer: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The same Begin, alone or in a bundle, gets this from here on, not what it was answered before."""
        now.state, now.answer = state, answer if self._replies.kept else ()
        self._replies.forget()
        return answer

    def _step(self, now: Any, message: Any, raw: bytes, key: bytes) -> Answer:
        state = now.state
        if not isinstance(message, EncryptedSum) or not isinstance(state, EncryptedVector):
            return super()._step(now, message, raw, key)
        now.state = None
        if self._floats is None:
            return (state.open(raw),)
        self.total = state.read(raw)
        return ()

    def __repr__(self) -> str:
        return f"<SharedPartyDriver of {self.name!r}>"
