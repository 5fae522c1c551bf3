"""A party's steps within a round; :mod:`choral.protocols.masking.party` says what they protect, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from choral.protocols.crypto.keys import PrivateKey, SealError, WeakKeyError, seal, unseal
from choral.protocols.crypto.shamir import split
from choral.protocols.crypto.single_use import Once
from choral.protocols.driver import Randomness
from choral.protocols.errors import FaultyPartyError, FaultyServerError, SpecError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.mask_addition import masked
from choral.protocols.masking.membership import Membership, check_holders, check_order, in_round, survivors_of
from choral.protocols.masking.signing import NO_BEGIN
from choral.protocols.own_vector import checked

NONCE = bytes(12)
"""Fixed, because a sealing key seals one packet: it is derived for one sender, receiver and round's mask key."""


@dataclass(frozen=True, repr=False)
class Keys:
    """Private keys of one round. mask is shared out; transport opens packets, and is gone when they are open. masking:
    the former, loaded."""

    member: Membership
    number: int
    mask: bytes
    masking: PrivateKey
    transport: PrivateKey


@dataclass(frozen=True, repr=False)
class _Shared:
    """By neighbour that takes part: agreed, X25519 secrets for masks; channels, what opens its packet; masks, public
    mask keys. seed: of the self-mask. public: the own mask key.
    """

    member: Membership
    number: int
    seed: bytes
    own_share: bytes | None
    public: bytes
    agreed: Mapping[int, bytes]
    channels: Mapping[int, bytes]
    masks: Mapping[int, bytes]


@dataclass(frozen=True, repr=False)
class Held:
    """The two shares that this party holds of one neighbour's secrets; exists until the survivors are known."""

    seed_share: bytes
    key_share: bytes


@dataclass(frozen=True, repr=False)
class _Masking:
    """pairs: mask seeds, by neighbour. roster: the digest of who takes part, as this party was shown it."""

    member: Membership
    number: int
    seed: bytes
    own_share: bytes | None
    pairs: Mapping[int, bytes]
    held: Mapping[int, Held]
    roster: bytes


@dataclass(frozen=True, repr=False)
class AwaitingSurvivors:
    """partners: the neighbours masked with. held: the shares of those whose packet opened. roster: as in _Masking."""

    member: Membership
    number: int
    own_share: bytes | None
    partners: frozenset[int]
    held: Mapping[int, Held]
    roster: bytes


@dataclass(frozen=True, repr=False)
class ChosenShare:
    """What one holder will reveal of one party: its share of the seed if that survived, else of the mask key."""

    share: bytes
    survived: bool


@dataclass(frozen=True, repr=False)
class _Agreed:
    member: Membership
    number: int
    bitmap: bytes
    survivors: frozenset[int]
    reveals: Mapping[int, ChosenShare]


class Advertised(Once[Keys]):
    """Has shown its mask key for the round; waits for its neighbours'."""

    def share(self, roster: bytes, *, randomness: Randomness, begun: bytes = NO_BEGIN) -> tuple[SharesSent, bytes]:
        """Share the seed of the self-mask and the mask key among the neighbours that take part.

        begun: digest of the Begin that this party was shown; who was shown another one has other masks with it.
        From here on no state of an earlier round answers any more.

        Raises: FaultyServerError for a forged key or one of no neighbour; FaultyPartyError for a key of small order,
        which an honest server does not forward; TooFewSurvivorsError when fewer than the threshold take part;
        StateUsedError when a later round has begun.
        """
        keys = self._take()
        member = keys.member
        member.current.enter(keys.number, begun)
        setup, me = member.setup, member.index
        message = in_round(messages.Roster, roster, member, keys.number, setup.neighbours)
        check_order([entry.party for entry in message.entries], member.neighbours, "keys")
        for entry in message.entries:
            signed = signing.advertise(member.session, keys.number, entry.party, entry.mask, entry.transport)
            if not member.policy.signatures.valid(member.key(entry.party), signed, entry.signature):
                raise FaultyServerError(
                    f"the keys of {setup.roster[entry.party]} are not signed by its pinned identity for this round"
                )
        peers = [entry.party for entry in message.entries]
        check_holders(member, peers, "to share a secret")
        masks = {entry.party: entry.mask for entry in message.entries}
        masking, opening = keys.masking, keys.transport  # gone when this step is done
        agreed = {peer: agree(masking, mask, setup.roster[peer]) for peer, mask in masks.items()}
        channels = {
            entry.party: signing.channel(agree(opening, entry.transport, setup.roster[entry.party]), member.session)
            for entry in message.entries
        }
        seed = randomness(32)
        holders = [*peers, me] if setup.complete else peers
        seed_shares, key_shares = split(
            [seed, keys.mask],
            threshold=setup.threshold,
            indices=[holder + 1 for holder in holders],
            randomness=randomness,
        )
        public = masking.public()
        packets = tuple(
            _packet(member, keys.number, channels[peer], public, peer, seed_share, key_share)
            for peer, seed_share, key_share in zip(peers, seed_shares, key_shares, strict=False)
        )
        own_share = seed_shares[-1] if setup.complete else None
        shares = messages.DealtShares(
            member.id,
            keys.number,
            signing.seed_commitment(member.session, keys.number, me, seed),
            own_share and signing.share_hash(member.session, keys.number, "seed", me, me, own_share),
            packets,
        )
        sent = _Shared(member, keys.number, seed, own_share, public, agreed, channels, masks)
        return SharesSent(sent), messages.encode(shares)


class SharesSent(Once[_Shared]):
    """Has sent its shares; waits for those that its neighbours made for it."""

    def receive(self, deliveries: bytes, *, begun: bytes | None = None) -> Ready:
        """Open the neighbours' packets. Those who sent one are whom this party masks with, whether it opens or not.

        A packet that does not open, or holds other shares than were committed to, costs this party nothing: masking
        needs the dealer's signed key only, and cancels as it would. It only holds no share of that dealer, and says so
        when it confirms. Fewer shares of a dealer are never less privacy: each set of survivors still needs the
        threshold of signatures. So neither a cheating dealer nor a server that garbles packets can push this party out
        of the sum, and one that deals garbage to too many can only be found unreachable, and named.

        begun: digest of the Begin, where this party dealt before it was shown one.
        Raises: FaultyServerError for a packet of no neighbour; TooFewSurvivorsError for too few packets;
        StateUsedError when a later round has begun.
        """
        shared = self._take()
        member, number = shared.member, shared.number
        if begun is None:
            member.current.check(number)
        else:
            member.current.enter(number, begun)
        message = in_round(messages.Deliveries, deliveries, member, number, member.setup.neighbours)
        check_order([packet.party for packet in message.packets], shared.masks, "packets")
        check_holders(member, [packet.party for packet in message.packets], "to hold this party's shares")
        opened = {packet.party: _open(shared, packet) for packet in message.packets}
        held = {peer: shares for peer, shares in opened.items() if shares is not None}
        shown, around = member.current.begun, (member.session, number, member.index)
        pairs = {peer: signing.pair_seed(shared.agreed[peer], *around, peer, shown) for peer in opened}
        masks = {peer: shared.masks[peer] for peer in opened} | {member.index: shared.public}
        roster = signing.roster(member.session, number, shown, masks)
        return Ready(_Masking(member, number, shared.seed, shared.own_share, pairs, held, roster))


class Ready(Once[_Masking]):
    """Everything is agreed; waits for this party's own vector."""

    @property
    def unopened(self) -> tuple[str, ...]:
        """Whose packets did not open: their fault, or that of the server that carried them. () once used."""
        return tuple(
            masking.member.setup.roster[peer]
            for masking in tuple(self._content)
            for peer in sorted(masking.pairs.keys() - masking.held.keys())
        )

    def upload(self, vector: Any) -> tuple[Uploaded, bytes]:
        """Mask the vector: y = x + PRG(seed) + sum of +-PRG(pair), mod 2^b (Bonawitz et al. 2017, 4.0.2).

        vector: int64, shape (length,), |value| <= bound; numpy, or a torch tensor (on a GPU it is masked there).
        Time: one mask expansion for each neighbour, and one more. Memory: one vector.
        Raises: InputError, without spending the state: the mistake is the caller's own, and nothing was revealed;
        StateUsedError when a later round has begun.
        """
        for waiting in tuple(self._content):
            setup = waiting.member.setup
            vector = checked(vector, setup.length, setup.bound, setup.weight_bound)
        masking = self._take()
        masking.member.current.check(masking.number)
        setup, me = masking.member.setup, masking.member.index
        added = [masking.seed, *(seed for peer, seed in masking.pairs.items() if peer < me)]
        subtracted = [seed for peer, seed in masking.pairs.items() if peer > me]
        packed = masked(vector, setup.modulus_bits, added, subtracted)
        message = messages.Upload(masking.member.id, masking.number, messages.to_pieces(packed))
        partners = frozenset(masking.pairs)
        sent = AwaitingSurvivors(
            masking.member, masking.number, masking.own_share, partners, masking.held, masking.roster
        )
        return Uploaded(sent), messages.encode(message)


class Uploaded(Once[AwaitingSurvivors]):
    """Has sent its masked vector; waits for the set of survivors."""

    def confirm(self, survivors: bytes) -> tuple[Confirmed, bytes]:
        """Agree to the sum over ``survivors`` by signing it; from here only one share of each neighbour is left.

        Raises: FaultyServerError when the set leaves this party out or has a neighbour that never shared;
        TooFewSurvivorsError when it is smaller than ``min_survivors``, or has too few neighbours to unmask anyone;
        StateUsedError when a later round has begun.
        """
        waiting = self._take()
        member, number, me = waiting.member, waiting.number, waiting.member.index
        member.current.check(number)
        message = in_round(messages.Survivors, survivors, member, number, -(-len(member.setup.roster) // 8))
        alive = survivors_of(member, message.bitmap)
        for peer in member.neighbours:
            if peer in alive and peer not in waiting.partners:
                raise FaultyServerError(f"{member.setup.roster[peer]} survives but never shared its secrets with us")
        check_holders(member, [peer for peer in member.neighbours if peer in alive], "to unmask anyone")
        reveals = chosen_shares(waiting, alive)
        signed = signing.confirm(member.session, number, me, message.bitmap, member.current.begun)
        state = Confirmed(_Agreed(member, number, message.bitmap, alive, reveals))
        unopened = tuple(sorted(waiting.partners - waiting.held.keys()))
        return state, messages.encode(messages.Confirm(member.id, number, member.identity.sign(signed), unopened))


def waiting_of(uploaded: Uploaded) -> AwaitingSurvivors:
    """What a state after another upload than that is made of; this one is used then."""
    return uploaded._take()


class Confirmed(Once[_Agreed]):
    """Has signed one set of survivors and holds one share per neighbour; waits for the others' signatures."""

    def unmask(self, confirmations: bytes, *, following: bytes | None = None) -> bytes:
        """Reveal those shares, once at least the threshold of this party's holders signed the very same set.

        following: the Advertise of the next round, to ride on this message and save it a trip.
        Raises: FaultyServerError for a signature that is not of this set, round and party; TooFewSurvivorsError;
        StateUsedError when a later round has begun.
        """
        agreed = self._take()
        member, number = agreed.member, agreed.number
        member.current.check(number)
        message = in_round(messages.Confirmations, confirmations, member, number, member.setup.neighbours)
        signers = [entry.party for entry in message.entries]
        check_order(signers, [peer for peer in member.neighbours if peer in agreed.survivors], "confirmations")
        for entry in message.entries:
            signed = signing.confirm(member.session, number, entry.party, agreed.bitmap, member.current.begun)
            if not member.policy.signatures.valid(member.key(entry.party), signed, entry.signature):
                who = member.setup.roster[entry.party]
                raise FaultyServerError(
                    f"the confirmation of {who} is not on the set shown to this party: the server showed different"
                    " sets, or different models"
                )
        check_holders(member, signers, "to agree on the survivors")
        return unmasking(member, number, agreed.reveals, _riding(following, member, number))


def chosen_shares(waiting: AwaitingSurvivors, alive: frozenset[int]) -> dict[int, ChosenShare]:
    """Of each neighbour one share: of its seed if it survived, else of its key."""
    chosen = {
        peer: ChosenShare(held.seed_share if peer in alive else held.key_share, peer in alive)
        for peer, held in waiting.held.items()
    }
    if waiting.own_share is not None:
        chosen[waiting.member.index] = ChosenShare(waiting.own_share, survived=True)
    return chosen


def unmasking(
    member: Membership,
    number: int,
    reveals: Mapping[int, ChosenShare],
    following: messages.Following | None = None,
) -> bytes:
    """The answer that gives these shares out."""
    ordered = sorted(reveals.items())
    seeds = tuple(messages.Revealed(peer, reveal.share) for peer, reveal in ordered if reveal.survived)
    keys = tuple(messages.Revealed(peer, reveal.share) for peer, reveal in ordered if not reveal.survived)
    return messages.encode(messages.Unmask(member.id, number, seeds, keys, following))


def _riding(following: bytes | None, member: Membership, number: int) -> messages.Following | None:
    if following is None:
        return None
    message = messages.to_server(
        following, sender=member.setup.roster[member.index], limit=messages.limit(messages.Advertise)
    )
    if not isinstance(message, messages.Advertise) or message.session != member.id or message.round <= number:
        raise SpecError("expected the Advertise of a later round of this session to ride along")
    return messages.Following(message.round, message.mask, message.transport, message.signature)


def _packet(
    member: Membership, number: int, channel: bytes, public: bytes, peer: int, seed_share: bytes, key_share: bytes
) -> messages.Packet:
    session, me = member.session, member.index
    seed_hash = signing.share_hash(session, number, "seed", me, peer, seed_share)
    key_hash = signing.share_hash(session, number, "key", me, peer, key_share)
    key = signing.seal_key(channel, number, me, peer, public)
    data = signing.seal_data(session, number, me, peer, seed_hash, key_hash)
    return messages.Packet(peer, seed_hash, key_hash, seal(key, NONCE, seed_share + key_share, data))


def _open(shared: _Shared, packet: messages.Packet) -> Held | None:
    """The two shares, or None unless they are what the packet commits to, sealed by its sender for this party."""
    session, me, peer, number = shared.member.session, shared.member.index, packet.party, shared.number
    key = signing.seal_key(shared.channels[peer], number, peer, me, shared.masks[peer])
    data = signing.seal_data(session, number, peer, me, packet.seed_hash, packet.key_hash)
    try:
        shares = unseal(key, NONCE, packet.sealed, data)
    except SealError:
        return None
    held = Held(shares[:33], shares[33:])
    seed_hash = signing.share_hash(session, number, "seed", peer, me, held.seed_share)
    key_hash = signing.share_hash(session, number, "key", peer, me, held.key_share)
    return held if (seed_hash, key_hash) == (packet.seed_hash, packet.key_hash) else None


def agree(private: PrivateKey, public: bytes, name: str) -> bytes:
    try:
        return private.shared(public)
    except WeakKeyError as error:
        raise FaultyPartyError(name, f"signed an unusable key: {error}") from None
