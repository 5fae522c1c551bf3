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
from choral.protocols.driver import Answer, used
from choral.protocols.errors import FaultyServerError
from choral.protocols.homomorphic.shared import key_messages
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.key_messages import EncryptedSum, KeyConfirmations, KeyDeal, limit
from choral.protocols.homomorphic.shared.party import ConfirmingKey, EncryptedVector, Holder, KeyAgreement, Waiting
from choral.protocols.masking import messages
from choral.protocols.masking.party import Revealing
from choral.protocols.masking.party_driver import MaskedPartyDriver, PartyContext, needed
from choral.protocols.masking.policy import Policy
from choral.protocols.stored_state import stored


class SharedPartyDriver(MaskedPartyDriver):
    """See :class:`choral.protocols.driver.PartyDriver`. floats: what is summed in CKKS; None, integers.

    total: of floats, the sum of the last round that was opened here, and whose vectors are in it.
    Raises: SpecError.
    """

    known = key_messages.ToParty
    waits = Holder

    def __init__(self, context: PartyContext, *, floats: terms.Floats | None = None) -> None:
        self._floats, self._private = floats, b""
        self._keying: Waiting | ConfirmingKey | None = None
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
        self._keying = self._holder = None

    def _limit(self) -> int:
        setup, most = self._setup, super()._limit()
        if setup is None:
            return most
        n, plan = len(setup.roster), terms.plan_of(len(setup.roster), setup, self._floats)
        size = terms.blocks_of(plan, setup.length) * plan.parameters.full_bytes + n // 8 + 1
        parts = limit(KeyConfirmations, n) + messages.limit(messages.Begin)
        return max(most, limit(EncryptedSum, size), limit(KeyDeal, 1), messages.limit(messages.Bundle, parts))

    def _take(self, message: Any, raw: bytes, key: bytes) -> Answer:
        if isinstance(message, KeyDeal | KeyConfirmations):
            return self._hand_out(message, raw)
        return super()._take(message, raw, key)

    def _revealed(self, setup: messages.SumSetup, opening: Revealing, raw: bytes) -> Answer:
        """The session is open once the key is handed out."""
        agreement = KeyAgreement((self._private, terms.plan_of(len(setup.roster), setup, self._floats)))
        self._private = b""
        self._keying, deal = agreement.meet(opening, raw, randomness=self._randomness)
        return () if deal is None else (deal,)

    def _hand_out(self, message: KeyDeal | KeyConfirmations, raw: bytes) -> Answer:
        kind, keying = type(message).__name__, self._keying
        if self._setup is None or message.session != self._setup.session:
            raise FaultyServerError(f"the {kind} is of another session")
        if isinstance(message, KeyDeal) and isinstance(keying, Waiting):
            self._keying = None
            self._keying, confirm = keying.receive(raw)
            return (confirm,)
        if isinstance(message, KeyConfirmations) and isinstance(keying, ConfirmingKey):
            self._keying = None
            self._holder = keying.enter(raw)
            self._membership = self._holder.member
            return ()
        if isinstance(message, KeyConfirmations) and self._holder is not None:
            return ()  # until a party is heard in the open session, each Begin brings them along
        raise used(f"its {kind} was not waited for: that step was taken")

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
