"""One party of a sum under a shared key: bytes in, bytes and the next state out; :mod:`.party_driver` has the order.

The session is opened by the masked sum's steps (:mod:`choral.protocols.masking.party`), with its policy and its signed
commitments; the nonce that a party commits to and reveals is its fresh X25519 public key, which is thereby signed by
its pinned identity and fixed before anybody's is shown.

Threat model: :mod:`choral.protocols.homomorphic.shared.secure_sum`. While the key is handed out the server may do what
it likes: the seed is sealed to those keys, and nothing is encrypted before every party has signed the same commitment
to it. After that the server must be honest but curious, and so must the parties.

Each round has its own key, from a chain of one-way steps that starts at the dealt seed; a link is forgotten when the
next is made. So two rounds' ciphertexts cannot be added, and who takes a party's machine later opens no past round.
A party opens at most one sum of a round, of vectors of at least ``min_survivors`` parties, and never one of a round
before the last that it encrypted for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tenseal.sealapi as sealapi
from numpy.typing import NDArray

from choral.protocols.argument_checks import shown
from choral.protocols.crypto.keys import SealError, WeakKeyError, seal, unseal, x25519_shared
from choral.protocols.crypto.modular_integers import pack, wrap
from choral.protocols.crypto.single_use import Once
from choral.protocols.driver import Randomness
from choral.protocols.errors import (
    SERVER,
    FaultyPartyError,
    FaultyPartyOrServerError,
    FaultyServerError,
    GarbledSumError,
    KeyDisputeError,
    SpecError,
)
from choral.protocols.homomorphic.shared import key_messages
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.seal import RingKey, ring_of
from choral.protocols.homomorphic.shared.seal_files import CiphertextError
from choral.protocols.homomorphic.shared.setup import DEALER, Plan
from choral.protocols.masking import messages, party
from choral.protocols.masking.membership import Membership, survivors_of
from choral.protocols.masking.party_round import NONCE
from choral.protocols.own_vector import checked, checked_floats, is_tensor
from choral.protocols.wire_format import encode, read


@dataclass(frozen=True, repr=False)
class _Entered:
    """private: of the X25519 key whose public one this party revealed as its nonce. seed: once it is there."""

    member: Membership
    plan: Plan
    private: bytes
    publics: tuple[bytes, ...]
    seed: bytes = b""

    @property
    def commitment(self) -> bytes:
        return terms.key_commitment(self.member.session, self.seed)

    def shared(self, place: int, receiver: int) -> bytes:
        """Seals the seed to ``receiver``; by the key agreement with the party at ``place``. Raises: WeakKeyError."""
        return terms.seal_key(x25519_shared(self.private, self.publics[place]), self.member.session, receiver)

    def signature(self) -> bytes:
        member = self.member
        return member.identity.sign(terms.confirm(member.session, member.index, self.commitment))

    def signed(self, place: int, commitment: bytes, signature: bytes) -> bool:
        message = terms.confirm(self.member.session, place, commitment)
        return self.member.policy.signatures.valid(self.member.key(place), message, signature)


@dataclass(frozen=True, repr=False)
class Chain:
    """member: whose session is that of the key, too. link: the chain's secret after round ``last``."""

    member: Membership
    plan: Plan
    link: bytes
    last: int


def _from_server(kind: type[Any], raw: bytes, session: bytes, entries: int, *, number: int = 0) -> Any:
    """As in the masked sum. A session and its key are one name once the key is there."""
    most = key_messages.limit(kind, entries)
    return messages.from_server(kind, raw, session, most, number=number, known=key_messages.ToParty)


def meet(
    revealing: party.Revealing, reveals: bytes, private: bytes, plan: Plan, *, randomness: Randomness
) -> tuple[Waiting | ConfirmingKey, bytes | None]:
    """Enter the session. The dealer then deals the key, and so confirms it. private: of this party's public key.

    Raises: FaultyPartyOrServerError, FaultyServerError as :meth:`choral.protocols.masking.party.Revealing.enter`;
    FaultyPartyError for a public key of small order.
    """
    member, _ = revealing.enter(reveals)._take()
    publics = read(messages.Reveals, reveals, sender=SERVER, limit=len(reveals)).nonces
    if member.index != DEALER:
        return Waiting(_Entered(member, plan, private, publics)), None
    entered = _Entered(member, plan, private, publics, randomness(32))
    sealed = []
    for place, name in enumerate(member.setup.roster):
        if place != DEALER:
            try:
                key = entered.shared(place, place)
            except WeakKeyError:
                raise FaultyPartyError(name, "its public key is of small order") from None
            sealed.append(seal(key, NONCE, entered.seed, terms.seal_data(member.session, place, entered.commitment)))
    deal = key_messages.KeyDeal(member.setup.session, entered.commitment, tuple(sealed), entered.signature())
    return ConfirmingKey(entered), encode(deal)


class Waiting(Once[_Entered]):
    """Waits for the dealer's seed."""

    def receive(self, deal: bytes) -> tuple[ConfirmingKey, bytes]:
        """Open the seed and confirm, by signature, which one it is.

        Raises: FaultyPartyOrServerError when the deal is not signed by the dealer for this session, or does not open;
        FaultyPartyError when the seed is not the one committed to; FaultyServerError; MessageError.
        """
        entered = self._take()
        member = entered.member
        dealer = member.setup.roster[DEALER]
        message = _from_server(key_messages.KeyDeal, deal, member.setup.session, 1)
        if not entered.signed(DEALER, message.commitment, message.signature):
            raise FaultyPartyOrServerError(dealer, "the key is not signed by the dealer's pinned identity")
        try:
            key = entered.shared(DEALER, member.index)
            data = terms.seal_data(member.session, member.index, message.commitment)
            entered = replace(entered, seed=unseal(key, NONCE, message.sealed[0], data))
        except (SealError, WeakKeyError):
            raise FaultyPartyOrServerError(dealer, "the sealed key does not open") from None
        if entered.commitment != message.commitment:
            raise FaultyPartyError(dealer, "sealed another key than it committed to")
        confirm = key_messages.KeyConfirm(member.setup.session, entered.commitment, entered.signature())
        return ConfirmingKey(entered), encode(confirm)


class ConfirmingKey(Once[_Entered]):
    """Waits to see that everyone holds the same key."""

    def enter(self, confirmations: bytes) -> Holder:
        """Raises: KeyDisputeError when somebody holds another key; FaultyServerError for a missing or forged one."""
        entered = self._take()
        member, n = entered.member, len(entered.member.setup.roster)
        message = _from_server(key_messages.KeyConfirmations, confirmations, member.setup.session, n)
        if len(message.entries) != n:
            raise FaultyServerError(f"expected {n} confirmations, one per party, got {len(message.entries)}")
        for place, entry in enumerate(message.entries):
            if not entered.signed(place, entry.commitment, entry.signature):
                raise FaultyServerError(
                    f"the confirmation of {member.setup.roster[place]} is not signed by its pinned identity"
                )
        for place, entry in enumerate(message.entries):
            if entry.commitment != entered.commitment:
                raise KeyDisputeError(member.setup.roster[DEALER], member.setup.roster[place])
        session = terms.keyed_session(member.session, entered.commitment)
        link = terms.next_link(session, entered.seed, 0)
        return Holder(Chain(replace(member, session=session), entered.plan, link, 0))


class Holder(Once[Chain]):
    """In a session, between rounds; holds the chain's secret for the rounds to come."""

    @property
    def member(self) -> Membership:
        """Raises: IndexError once used."""
        return self._content[0].member

    def encrypt(self, number: int, vector: Any, begun: bytes = terms.NO_BEGIN) -> tuple[Holder, EncryptedVector, bytes]:
        """Make the key of round ``number``, forget everything that could make it again, and encrypt under it.

        vector: int64 (BFV; a numpy array or a torch tensor) or float64 (CKKS; a numpy array), shape (length,), every
        |value| within the bound. begun: digest of the Begin that this party was shown; with one that was shown another
        it has no sum. From here on no sum of an earlier round is opened any more.

        Raises: FaultyServerError when that round is not after the last, or too far ahead; InputError for another
        vector. Neither spends the state.
        """
        for chain in tuple(self._content):
            most = min(1 << 32, chain.last + terms.MAX_SKIPPED)
            if isinstance(number, bool) or not isinstance(number, int) or not chain.last < number < most:
                raise FaultyServerError(f"asked for round {shown(number)} after round {chain.last}")
            if chain.plan.scheme == "bfv":
                setup = chain.member.setup
                vector = checked(vector, setup.length, setup.bound, setup.weight_bound)
                vector = np.ascontiguousarray(vector.cpu().numpy() if is_tensor(vector) else vector)
            else:
                vector = checked_floats(vector, chain.member.setup.length, chain.plan.bound)
        chain = self._take()
        chain.member.current.enter(number, begun)
        link = chain.link
        for skipped in range(chain.last + 1, number):
            link = terms.next_link(chain.member.session, link, skipped)
        ring, plan = ring_of(chain.plan.parameters), chain.plan
        key = RingKey.from_seed(ring, terms.round_seed(chain.member.session, link, number, begun))
        later = replace(chain, link=terms.next_link(chain.member.session, link, number), last=number)
        encryptor = key.encryptor()
        body = b"".join(
            ring.dump_fresh(encryptor.encrypt_symmetric(plan.encode(ring, vector[start : start + plan.block])))
            for start in range(0, vector.size, plan.block)
        )
        upload = encode(messages.Upload(chain.member.id, number, messages.to_pieces(body)))
        return Holder(later), EncryptedVector((later, key)), upload


class EncryptedVector(Once[tuple[Chain, RingKey]]):
    """Has sent its vector; may be asked to open the sum, once."""

    def open(self, encrypted: bytes) -> bytes:
        """Decrypt the exact sum and report it to the server: BFV only.

        Raises: SpecError in CKKS, whose decryptions stay with the parties; StateUsedError when a later round has begun;
        MessageError, FaultyServerError for another sum than of this round and key, or without this party;
        TooFewSurvivorsError; GarbledSumError.
        """
        for chain, _ in tuple(self._content):
            if chain.plan.scheme != "bfv":
                raise SpecError("a sum of floats is for the parties alone: it is never reported to the server")
        chain, key = self._take()
        total, _ = _decrypted(chain, key, encrypted)
        bits = chain.member.setup.modulus_bits
        packed = pack(wrap(total, bits), bits)
        return encode(key_messages.OpenedSum(chain.member.id, chain.last, messages.to_pieces(packed)))

    def read(self, encrypted: bytes) -> tuple[NDArray[Any], tuple[str, ...]]:
        """Decrypt the sum for this party itself: the total, and whose vectors are in it. Raises: see :meth:`open`."""
        return _decrypted(*self._take(), encrypted)


def _decrypted(chain: Chain, key: RingKey, encrypted: bytes) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Of the round that is the chain's last."""
    plan, number = chain.plan, chain.last
    chain.member.current.check(number)
    setup, size = chain.member.setup, plan.parameters.full_bytes
    blocks = terms.blocks_of(plan, setup.length)
    most = blocks * size + len(setup.roster) // 8 + 1
    message = _from_server(key_messages.EncryptedSum, encrypted, chain.member.id, most, number=number)
    survivors = survivors_of(chain.member, message.survivors)
    body = memoryview(messages.from_pieces(message.ciphertexts) or b"")
    if len(body) != blocks * size:
        raise FaultyServerError(f"expected {blocks} ciphertexts of {size} bytes in the sum, got {len(body)} bytes")
    total, decryptor, plain = np.empty(setup.length, plan.dtype), key.decryptor(), sealapi.Plaintext()
    for start in range(0, setup.length, plan.block):
        stop, at = min(start + plan.block, setup.length), start // plan.block * size
        try:
            ciphertext = key.ring.load_sum(body[at : at + size])
        except CiphertextError as error:
            raise FaultyServerError(f"the sum is no ciphertext: {error}") from None
        if plan.margin_bits and int(decryptor.invariant_noise_budget(ciphertext)) < plan.margin_bits:
            raise GarbledSumError("the sum has more noise than its parties can add: another key or changed bytes")
        decryptor.decrypt(ciphertext, plain)
        total[start:stop] = plan.decode(key.ring, plain, stop - start)
    largest = len(survivors) * plan.bound + plan.error_bound
    if not bool(np.all((total >= -largest) & (total <= largest))):
        raise GarbledSumError(f"the sum of {len(survivors)} vectors has a value outside what they can add up to")
    return total, tuple(setup.roster[place] for place in sorted(survivors))
