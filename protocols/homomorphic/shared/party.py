"""One party of a sum under a shared key: bytes in, bytes and the next state out.

    step      from         takes              gives                    to
    join      -            KeySetup           KeyHello                 Joining
    meet      Joining      KeyHellos          KeyDeal, KeyConfirm      Confirming   (the dealer)
                                              -                        Waiting      (everyone else)
    receive   Waiting      KeyDealt           KeyConfirm               Confirming
    enter     Confirming   KeyConfirmations   -                        Holder       (once per session)
    begin     Holder       a round number     -                        Holder, Keyed
    encrypt   Keyed        its own vector     Ciphertexts              Encrypted
    open      Encrypted    SumPieces          TotalPieces              -            (BFV, whoever the server asks)
    read      Encrypted    SumPieces          -                        -            (CKKS, everyone)

Threat model: :mod:`choral.protocols.homomorphic.shared.secure_sum`. While the key is handed out the server may do what
it likes: public keys are signed by pinned identities, the seed is sealed to them, and nothing is encrypted before every
party has signed the same commitment to it. After that the server must be honest but curious, and so must the parties.

Each round has its own key, from a chain of one-way steps that starts at the dealt seed; a link is forgotten when the
next is made. So two rounds' ciphertexts cannot be added, and who takes a party's machine later opens no past round.
A party opens at most one sum of a round, of vectors of at least ``min_survivors`` parties, and never one of a round
before the last that it encrypted for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from choral.protocols.crypto.keys import (
    SealError,
    WeakKeyError,
    ed25519_public,
    seal,
    unseal,
    x25519_public,
    x25519_shared,
)
from choral.protocols.crypto.single_use import Current, Once
from choral.protocols.errors import (
    SERVER,
    FaultyPartyError,
    FaultyPartyOrServerError,
    FaultyServerError,
    SpecError,
)
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.party_round import Chain, Keyed, Own, Round
from choral.protocols.homomorphic.shared.seal import RingKey
from choral.protocols.homomorphic.shared.setup import DEALER, KeyDisputeError, SharedPolicy
from choral.protocols.masking import messages as base
from choral.protocols.masking.signing import digest, setup_digest, sign

Randomness = Callable[[int], bytes]
"""``randomness(n)``: n secret uniform bytes, never the same twice. ``secrets.token_bytes`` outside tests."""

NONCE = bytes(12)
"""Fixed, because a sealing key seals one seed: it is derived for one receiver's fresh public key in one session."""


@dataclass(frozen=True, repr=False)
class _Meeting:
    own: Own
    session: bytes
    publics: tuple[bytes, ...]


@dataclass(frozen=True, repr=False)
class _Seeded:
    own: Own
    session: bytes
    commitment: bytes
    seed: bytes


def join(
    setup: bytes, *, name: str, identity: bytes, policy: SharedPolicy, randomness: Randomness
) -> tuple[Joining, bytes]:
    """Accept the server's terms, or refuse them, having sent nothing.

    identity: the 32-byte Ed25519 seed whose public key the directory pins under ``name``.
    Raises: PolicyError for terms weaker than the policy's; MessageError; SpecError for an identity that is not pinned.
    """
    limit = wire.limit(wire.KeySetup, len(policy.directory))
    message = wire.read(wire.KeySetup, setup, sender=SERVER, limit=limit)
    plan = policy.check(message, name)
    if ed25519_public(identity) != policy.directory[name]:
        raise SpecError(f"the identity of {name!r} is not the one in its own directory")
    terms_digest, index = setup_digest(setup), message.roster.index(name)
    own = Own(message, terms_digest, index, identity, policy, plan, randomness(32), randomness(32))
    public = x25519_public(own.private)
    signature = sign(identity, terms.hello(terms_digest, index, public, own.nonce))
    return Joining(own), base.encode(wire.KeyHello(message.session, public, own.nonce, signature))


class Joining(Once[Own]):
    """Waits for everybody's KeyHello."""

    def meet(self, hellos: bytes, *, randomness: Randomness) -> tuple[Waiting | Confirming, tuple[bytes, ...]]:
        """Check who is there. The dealer then deals the key, and confirms it like everyone.

        Raises: FaultyServerError when a KeyHello is missing, forged, or this party's own is not what it sent;
        FaultyPartyError for a public key of small order.
        """
        own = self._take()
        n = len(own.setup.roster)
        message = wire.read(wire.KeyHellos, hellos, sender=SERVER, limit=wire.limit(wire.KeyHellos, n))
        if message.session != own.setup.session:
            raise FaultyServerError("the KeyHellos are of another session")
        if len(message.entries) != n:
            raise FaultyServerError(f"expected {n} KeyHellos, one per party, got {len(message.entries)}")
        mine = message.entries[own.index]
        if (mine.public, mine.nonce) != (x25519_public(own.private), own.nonce):
            raise FaultyServerError("it shows another KeyHello of this party than it sent")
        whole = digest("shared/checked hellos", own.digest, hellos)
        for party, entry in enumerate(message.entries if whole not in own.policy.checked else ()):
            if not own.signed(party, terms.hello(own.digest, party, entry.public, entry.nonce), entry.signature):
                raise FaultyServerError(f"the KeyHello of {own.name(party)} is not signed by its pinned identity")
        own.policy.checked.add(whole)
        publics = tuple(entry.public for entry in message.entries)
        nonces = b"".join(entry.nonce for entry in message.entries)
        meeting = _Meeting(own, terms.session_digest(own.digest, b"".join(publics), nonces), publics)
        return _deal(meeting, randomness(32)) if own.index == DEALER else (Waiting(meeting), ())


def _deal(meeting: _Meeting, seed: bytes) -> tuple[Confirming, tuple[bytes, ...]]:
    own, session = meeting.own, meeting.session
    commitment = terms.key_commitment(session, seed)
    sealed = []
    for party, public in enumerate(meeting.publics):
        if party != own.index:
            try:
                shared = x25519_shared(own.private, public)
            except WeakKeyError:
                raise FaultyPartyError(own.name(party), "its public key is of small order") from None
            key = terms.seal_key(shared, session, party)
            sealed.append(seal(key, NONCE, seed, terms.seal_data(session, party, commitment)))
    signature = sign(own.identity, terms.deal(session, commitment))
    deal = base.encode(wire.KeyDeal(own.setup.session, commitment, tuple(sealed), signature))
    state, confirm = _confirm(_Seeded(own, session, commitment, seed))
    return state, (deal, confirm)


def _confirm(seeded: _Seeded) -> tuple[Confirming, bytes]:
    own = seeded.own
    signature = sign(own.identity, terms.confirm(seeded.session, own.index, seeded.commitment))
    return Confirming(seeded), base.encode(wire.KeyConfirm(own.setup.session, seeded.commitment, signature))


class Waiting(Once[_Meeting]):
    """Waits for the dealer's seed."""

    def receive(self, dealt: bytes) -> tuple[Confirming, bytes]:
        """Open the seed and confirm, by signature, which one it is.

        Raises: FaultyPartyOrServerError when the deal is not signed by the dealer for this session, does not open, or
        the seed is not the one committed to.
        """
        meeting = self._take()
        own, session = meeting.own, meeting.session
        message = wire.read(wire.KeyDealt, dealt, sender=SERVER, limit=wire.limit(wire.KeyDealt))
        dealer = own.name(DEALER)
        if message.session != own.setup.session:
            raise FaultyServerError("the key is of another session")
        if not own.signed(DEALER, terms.deal(session, message.commitment), message.signature):
            raise FaultyPartyOrServerError(dealer, "the key is not signed by the dealer's pinned identity")
        try:
            key = terms.seal_key(x25519_shared(own.private, meeting.publics[DEALER]), session, own.index)
            seed = unseal(key, NONCE, message.sealed, terms.seal_data(session, own.index, message.commitment))
        except (SealError, WeakKeyError):
            raise FaultyPartyOrServerError(dealer, "the sealed key does not open") from None
        if terms.key_commitment(session, seed) != message.commitment:
            raise FaultyPartyError(dealer, "sealed another key than it committed to")
        return _confirm(_Seeded(own, session, message.commitment, seed))


class Confirming(Once[_Seeded]):
    """Waits to see that everyone holds the same key."""

    def enter(self, confirmations: bytes) -> Holder:
        """Raises: KeyDisputeError when somebody holds another key; FaultyServerError for a missing or forged one."""
        seeded = self._take()
        own, session = seeded.own, seeded.session
        n = len(own.setup.roster)
        limit = wire.limit(wire.KeyConfirmations, n)
        message = wire.read(wire.KeyConfirmations, confirmations, sender=SERVER, limit=limit)
        if message.session != own.setup.session:
            raise FaultyServerError("the confirmations are of another session")
        if len(message.entries) != n:
            raise FaultyServerError(f"expected {n} confirmations, one per party, got {len(message.entries)}")
        whole = digest("shared/checked confirmations", session, confirmations)
        for party, entry in enumerate(message.entries if whole not in own.policy.checked else ()):
            if not own.signed(party, terms.confirm(session, party, entry.commitment), entry.signature):
                raise FaultyServerError(f"the confirmation of {own.name(party)} is not signed by its pinned identity")
        own.policy.checked.add(whole)
        for party, entry in enumerate(message.entries):
            if entry.commitment != seeded.commitment:
                raise KeyDisputeError(own.name(DEALER), own.name(party))
        link = terms.first_link(session, seeded.seed)
        return Holder(Chain(own, session, seeded.commitment, link, 0, Current()))


class Holder(Once[Chain]):
    """In a session, between rounds; holds the chain's secret for the rounds to come."""

    def begin(self, number: int) -> tuple[Holder, Keyed]:
        """Make the key of round ``number`` and forget everything that could make it again.

        Raises: FaultyServerError when that round is not after the last, or too far ahead; the state is not spent then.
        """
        for chain in tuple(self._content):
            if not chain.last < number < min(1 << 32, chain.last + terms.MAX_SKIPPED):
                raise FaultyServerError(f"asked for round {number} after round {chain.last}")
        chain = self._take()
        link = chain.link
        for skipped in range(chain.last + 1, number):
            link = terms.next_link(chain.session, link, skipped)
        seed = terms.round_seed(chain.session, link, number)
        after = terms.next_link(chain.session, link, number)
        later = Chain(chain.own, chain.session, chain.commitment, after, number, chain.current)
        key = RingKey.from_seed(terms.ring_of(chain.own.plan.parameters), seed)
        identifier = terms.key_id(chain.session, chain.commitment, number)
        return Holder(later), Keyed(Round(later, number, identifier, key))
