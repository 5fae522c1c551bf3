"""The server of a sum under a shared key as trips: it hands sealed keys on, and adds ciphertexts; it holds no key.

    trip           asks for     goes to                                                     stage
    hello, reveal  as in the masked sum                                                     its Opening, Gathering
    keys           KeyDeal      the roster, with everybody's public key; the dealer answers Dealing
    confirmation   KeyConfirm   the others, each with its sealed seed                       CollectingConfirmations
    vector         Upload       the roster, with a Begin                                    Adding
    unmasking      OpenedSum    one survivor, then another where it does not answer (BFV);  Totalling
                                every survivor, and nothing comes back (CKKS)

Stages and rules are the masked sum's (:mod:`choral.protocols.masking.server.opening`). Those that hand out the key need
everybody; the confirmations that end an opening ride on each party's first Begin, until it is heard. Memory: the
encrypted sum, 16 bytes per coefficient and prime; and the message that is being added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.modular_integers import PackingError, lift, packed_bytes, unpack
from choral.protocols.driver import RoundTerms, Trip
from choral.protocols.errors import FaultyPartyError, KeyDisputeError, SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.homomorphic.shared import key_messages
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.seal import ring_of
from choral.protocols.homomorphic.shared.seal_files import CiphertextError
from choral.protocols.homomorphic.shared.setup import DEALER, Floats, Plan, key_setup, plan_of
from choral.protocols.interface import IntVector, SumSpec
from choral.protocols.masking import messages
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.server.driver import NO_TRAINING, MaskedServerDriver
from choral.protocols.masking.server_stages import Outbox, Outcome, Seen, SessionTerms, Stage
from choral.protocols.masking.signing import SESSION_BYTES
from choral.protocols.wire_format import encode

EVERYONE = "a session opens with all its parties or not at all"


class Known(NamedTuple):
    """What the server knows of a session. id: what its messages name; once the key is confirmed, that as well."""

    terms: SessionTerms
    plan: Plan
    id: bytes


class _Stage(Stage):
    """One of round ``number``, or, in round 0, of those that hand out the key."""

    known = key_messages.ToServer

    def __init__(self, session: Known, number: int, expected: Sequence[int], seen: Seen) -> None:
        setup, plan = session.terms.setup, session.plan
        self._bytes = terms.blocks_of(plan, setup.length) * plan.parameters.seeded_bytes
        size = key_messages.limit(key_messages.KeyDeal, len(setup.roster))
        if number:
            total = key_messages.limit(key_messages.OpenedSum, packed_bytes(setup.length, setup.modulus_bits))
            size = max(messages.limit(messages.Upload, self._bytes), total)
        super().__init__(setup.roster, session.id, number, expected, size, seen)
        self._known, self._setup, self._taken = session, setup, session.terms.taken

    def _confirmed(self, place: int, message: Any) -> key_messages.ConfirmEntry:
        known = self._known.terms
        if not known.signed(place, terms.confirm(known.session, place, message.commitment), message.signature):
            what = f"its {type(message).__name__} is not signed by its pinned identity for this session"
            raise FaultyPartyError(self._roster[place], what)
        return key_messages.ConfirmEntry(message.commitment, message.signature)


class Dealing(_Stage):
    """Waits for the dealer's sealed seeds, once the masked sum's stages have opened the session."""

    kind = key_messages.KeyDeal

    def __init__(self, session: SessionTerms, plan: Plan) -> None:
        super().__init__(Known(session, plan, session.setup.session), 0, (DEALER,), {})

    def _accept(self, party: int, message: key_messages.KeyDeal) -> key_messages.KeyDeal:
        self._confirmed(party, message)
        if len(message.sealed) != len(self._roster) - 1:
            raise FaultyPartyError(self._roster[party], f"expected {len(self._roster) - 1} sealed keys")
        return message

    def close(self) -> tuple[CollectingConfirmations, Outbox]:
        """Raises: TooFewSurvivorsError when the dealer has not dealt."""
        self._close(1, EVERYONE)
        deal: key_messages.KeyDeal = self._heard[DEALER]
        others = [name for place, name in enumerate(self._roster) if place != DEALER]
        outbox = {
            name: encode(key_messages.KeyDeal(self._session, deal.commitment, (sealed,), deal.signature))
            for name, sealed in zip(others, deal.sealed, strict=True)
        }
        return CollectingConfirmations(self._known, deal, self._seen), outbox


class CollectingConfirmations(_Stage):
    """Waits until everyone has signed which key it holds. The dealer's signature came with the key."""

    kind = key_messages.KeyConfirm

    def __init__(self, session: Known, deal: key_messages.KeyDeal, seen: Seen) -> None:
        super().__init__(session, 0, range(len(session.terms.setup.roster)), seen)
        self._commitment = deal.commitment
        self._heard[DEALER] = key_messages.ConfirmEntry(deal.commitment, deal.signature)

    def _accept(self, party: int, message: key_messages.KeyConfirm) -> key_messages.ConfirmEntry:
        entry = self._confirmed(party, message)
        if message.commitment != self._commitment:
            raise KeyDisputeError(self._roster[DEALER], self._roster[party])
        return entry

    def close(self) -> tuple[Known, Outbox]:
        """The session from here on. Raises: TooFewSurvivorsError unless all confirmed."""
        everyone = self._close(len(self._roster), EVERYONE)
        raw = encode(key_messages.KeyConfirmations(self._session, tuple(self._heard[party] for party in everyone)))
        session = terms.keyed_session(self._known.terms.session, self._commitment)
        return self._known._replace(id=session[:SESSION_BYTES]), dict.fromkeys(self._roster, raw)


class Adding(_Stage):
    """Adds ciphertexts as they come."""

    kind = messages.Upload

    def __init__(self, session: Known, number: int) -> None:
        super().__init__(session, number, range(len(session.terms.setup.roster)), {})
        self._ring = ring_of(session.plan.parameters)
        self._sum: list[Any] = [None] * terms.blocks_of(session.plan, self._setup.length)

    @property
    def _uploads_are_over(self) -> bool:
        return self._closed

    def _accept(self, party: int, message: messages.Upload) -> None:
        size, body = self._known.plan.parameters.seeded_bytes, messages.from_pieces(message.vector)
        if body is None or len(body) != self._bytes:
            what = f"expected {len(self._sum)} ciphertexts of {size} bytes in its vector"
            raise FaultyPartyError(self._roster[party], what)
        pieces = [memoryview(body)[at : at + size] for at in range(0, len(body), size)]
        first, added = self._sum[0] is None, 0
        try:
            for place, piece in enumerate(pieces):
                ciphertext = self._ring.load_fresh(piece)
                if first:
                    self._sum[place] = ciphertext
                else:
                    self._ring.evaluator.add_inplace(self._sum[place], ciphertext)
                added += 1
        except CiphertextError as error:
            for place, piece in enumerate(pieces[:added]):
                if first:
                    self._sum[place] = None
                else:  # exactly what was added
                    self._ring.evaluator.sub_inplace(self._sum[place], self._ring.load_fresh(piece))
            raise FaultyPartyError(self._roster[party], f"its vector is no ciphertext: {error}") from None
        self._known.terms.taken[self._number] = self._known.terms.taken.get(self._number, 0) | 1 << party

    def close(self) -> Totalling:
        """End the round for those who have sent nothing. Raises: StateUsedError; TooFewSurvivorsError."""
        survivors = self._close(self._setup.min_survivors, "vectors sent")
        body = b"".join(self._ring.dump_sum(ciphertext) for ciphertext in self._sum)
        self._sum = []
        bitmap = messages.to_bitmap(survivors, len(self._roster))
        raw = encode(key_messages.EncryptedSum(self._session, self._number, bitmap, messages.to_pieces(body)))
        return Totalling(self._known, self._number, survivors, raw, self._seen)


class Totalling(_Stage):
    """Waits for the sum in clear from one survivor that was asked for it; in CKKS nobody is.

    encrypted: the EncryptedSum, the same for whoever gets it. survivors: names, in roster order.
    """

    kind = key_messages.OpenedSum

    def __init__(self, session: Known, number: int, survivors: Sequence[int], encrypted: bytes, seen: Seen) -> None:
        super().__init__(session, number, survivors if session.plan.scheme == "bfv" else (), seen)
        self.survivors = tuple(self._roster[party] for party in survivors)
        self.encrypted = encrypted
        self._asked: set[str] = set()

    @property
    def _uploads_are_over(self) -> bool:
        return True

    def ask(self, name: str) -> dict[str, bytes]:
        """The EncryptedSum for this survivor; again to ask another. Raises: SpecError for no survivor, and in CKKS."""
        if name not in self.survivors:
            raise SpecError(f"{name!r} is no survivor of this round: it refuses to open a sum without its vector")
        if self._known.plan.scheme != "bfv":
            raise SpecError("a sum of floats is for the parties alone: it is never reported to the server")
        self._asked.add(name)
        return {name: self.encrypted}

    def _accept(self, party: int, message: key_messages.OpenedSum) -> IntVector:
        name, bits = self._roster[party], self._setup.modulus_bits
        if name not in self._asked:
            raise FaultyPartyError(name, "was not asked for the sum")
        try:
            total = lift(unpack(messages.from_pieces(message.total) or b"", self._setup.length, bits), bits)
        except PackingError as error:
            raise FaultyPartyError(name, f"its sum is not packed as agreed: {error}") from None
        if int(np.abs(total).max()) > len(self.survivors) * self._setup.bound:
            raise FaultyPartyError(name, f"its sum has a value that {len(self.survivors)} vectors cannot add up to")
        return total

    def close(self) -> Outcome:
        """What the first that answered reported. Raises: StateUsedError unless somebody did."""
        if not self._heard:
            raise StateUsedError("the sum was not reported yet", hint="ask another survivor")
        self._closed = True
        return Outcome(next(iter(self._heard.values())), self.survivors)


@dataclass(frozen=True, kw_only=True)
class SharedKey(Masked):
    """The settings of a sum under a shared key, for :class:`SharedServerDriver`. floats: what is summed in CKKS."""

    corrupt: int | float | None = 0
    server: Literal["semi-honest", "malicious"] = "semi-honest"
    floats: Floats | None = None

    def setup(self, spec: SumSpec, *, session: bytes) -> messages.SumSetup:
        """The terms that every party signs. session: 16 fresh random bytes. Raises: SpecError."""
        n, wanted = len(spec.parties), self.min_survivors
        smallest = n // 2 + 1 if wanted is None else checks.whole(wanted, "min_survivors", 2, n)
        return key_setup(spec, session=session, min_survivors=smallest, floats=self.floats)


class SharedServerDriver(MaskedServerDriver):
    """See :class:`choral.protocols.driver.ServerDriver`. config: a :class:`SharedKey`. In CKKS no round has a result
    here: the parties have it. Who vanishes while the key is handed out ends the opening; open again."""

    _config: SharedKey
    _keyed: Known | None = None

    def forget(self, party: str) -> bool:  # noqa: ARG002
        """The key that all share is with those who were there: who was started anew has none, and needs a session."""
        return False

    def open(self) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`. Raises: KeyDisputeError, as a fault of the trip."""
        self._keyed = None
        yield from super().open()
        plan = plan_of(len(self.setup.roster), self.setup, self._config.floats)
        dealing = Dealing(self.session.terms, plan)
        yield self._trip("keys", dict.fromkeys(self.setup.roster, self._reveals), dealing, quorum=0)
        confirming, deals = dealing.close()
        yield self._trip("confirmation", deals, confirming, quorum=0)
        self._keyed, confirmations = confirming.close()
        self._reveals = confirmations[self.setup.roster[0]]

    def round(self, terms: RoundTerms = NO_TRAINING, *, lost: Iterable[str] = ()) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`."""
        if self._keyed is None:
            raise StateUsedError("the session is not open", hint="go through the trips of open()")
        raw, gone = self._next(terms, self._keyed.id), frozenset(lost)
        adding = Adding(self._keyed, self.number)
        asked = [party for party in self.setup.roster if party not in gone]
        yield self._trip("vector", {party: self._with_nonces(party, raw) for party in asked}, adding)
        totalling = adding.close()
        self._entered.update(totalling.survivors)
        there = [party for party in totalling.survivors if party not in gone]
        if self._config.floats is None:
            yield from self._opened(totalling, there)
        else:
            yield self._trip("unmasking", dict.fromkeys(there, totalling.encrypted), totalling, quorum=0)

    def _opened(self, totalling: Totalling, there: list[str]) -> Iterator[Trip]:
        for party in there:
            yield self._trip("unmasking", totalling.ask(party), totalling, quorum=0)
            if totalling.heard:
                return self._finish(totalling.close())
        raise TooFewSurvivorsError("nobody is left to open the sum", survivors=0, needed=1, missing=totalling.survivors)
