"""One party of the masked sum: a pure function per step, bytes in, bytes and the next state out.

    step       from        takes           gives                 to
    join       -           SumSetup        Hello                 Joining
    reveal     Joining     Hellos          Reveal                Revealing
    enter      Revealing   Reveals         -                     Member         (once per session)
    advertise  Member      a round number  Advertise             Member, Advertised
    share      Advertised  Roster          DealtShares           SharesSent
    receive    SharesSent  Deliveries      -                     Ready
    upload     Ready       its own vector  Upload                Uploaded
    confirm    Uploaded    Survivors       Confirm               Confirmed
    unmask     Confirmed   Confirmations   Unmask                -

Threat model. The server and up to ``corrupt`` other parties do whatever they like; what this party uploads must stay
uniform to them but for its part in the sum over one set of at least ``min_survivors`` parties. The party trusts its
pinned directory, its own randomness, and the caller to feed each state once. Every message is refused before anything
is computed from it; a refusal spends the state, so the party is out of that round. What another party may have caused,
a packet that does not open, is not refused but reported: no dealer can push this party out.

Over time: masks and packets have fresh keys each round, which no state keeps longer than its steps need them, so that
past rounds stay closed to whoever takes the machine later; and of two rounds only the one begun last is answered.

Why no double reveal is possible. For each neighbour the state Uploaded holds two shares: of its self-mask seed and of
its mask key. ``confirm`` turns each pair into *one* ``ChosenShare``, of the kind that the set of survivors decides, and
drops the other before the signature exists. Confirmed has no place for a second share; and each state is emptied by the
step that uses it. **A state must not be used twice, copied or stored**: :mod:`choral.protocols.crypto.single_use` sees
to it.

Reference: Bonawitz et al. 2017, figure 4; graph and local thresholds of Bell et al. 2020, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from choral.protocols.argument_checks import shown
from choral.protocols.crypto.keys import PrivateKey, SigningKey, ed25519_public
from choral.protocols.crypto.single_use import Current, Once, Sessions
from choral.protocols.driver import Randomness
from choral.protocols.errors import SERVER, FaultyPartyOrServerError, FaultyServerError, PolicyError, SpecError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.graph import around, ring_of
from choral.protocols.masking.membership import Membership
from choral.protocols.masking.party_round import Advertised, Keys
from choral.protocols.masking.policy import Policy, check_policy
from choral.protocols.wire_format import read


@dataclass(frozen=True, repr=False)
class _Own:
    """What a party knows of itself and of the setup."""

    setup: messages.SumSetup
    setup_digest: bytes
    index: int
    identity: bytes
    policy: Policy
    nonce: bytes
    current: Current


def join(
    setup: bytes,
    *,
    name: str,
    identity: bytes,
    policy: Policy,
    randomness: Randomness,
    sessions: Sessions | None = None,
    known: Any = messages.ToParty,
    further: Callable[[Any, Policy], None] | None = None,
) -> tuple[Joining, bytes]:
    """Accept the server's terms, or refuse them, having sent nothing.

    identity: the 32-byte Ed25519 seed whose public key the directory pins under ``name``. sessions: those of this
    identity, of which the one that is joined here is the only live one from now on; None, and there are no others.
    known: whatever the server may send in this protocol. further: refuses what a setup has beyond the masked sum's, as
    :func:`~choral.protocols.masking.ahead.floor.check_floor` does; without it such a setup is refused.
    Raises: PolicyError for terms weaker than the policy's; MessageError; SpecError for an identity that is not pinned.
    """
    check_policy(policy)
    most = messages.limit(messages.SumSetup, len(policy.directory))
    message: messages.SumSetup = policy.signatures.once(
        ("setup", known, setup, most),
        lambda: messages.expect(read(known, setup, sender=SERVER, limit=most), messages.SumSetup),
    )
    if further is not None:
        further(message, policy)
    elif type(message) is not messages.SumSetup:
        raise PolicyError("a setup with further terms, which this party was not told how to check")
    policy.check(message, name)
    if ed25519_public(identity) != policy.directory[name]:
        raise SpecError(f"the identity of {name!r} is not the one in its own directory")
    digest = signing.setup_digest(setup)
    index = message.roster.index(name)
    nonce = randomness(32)
    own = _Own(message, digest, index, identity, policy, nonce, Current(sessions))
    commitment = signing.commitment(digest, index, nonce)
    signature = signing.sign(identity, signing.hello(digest, index, commitment))
    return Joining(own), messages.encode(messages.Hello(message.session, commitment, signature))


class Joining(Once[_Own]):
    """Waits for everybody's Hello."""

    def reveal(self, hellos: bytes) -> tuple[Revealing, bytes]:
        """Show the nonce, once everyone is committed to theirs.

        Raises: FaultyServerError when a Hello is missing, forged, or this party's own is not what it sent.
        """
        own = self._take()
        own.current.check_live()
        once, directory = own.policy.signatures.once, own.policy.directory
        committed = once(("hellos", own.setup, hellos), lambda: _committed(own, hellos))
        if committed.to[own.index] != signing.commitment(own.setup_digest, own.index, own.nonce):
            raise FaultyServerError("it shows another Hello of this party than it sent")
        pinned = tuple(directory[name] for name in own.setup.roster)
        once(("signed", own.setup_digest, hellos, pinned), lambda: _check_signed(own, committed, pinned))
        return Revealing((own, committed)), messages.encode(messages.Reveal(own.setup.session, own.nonce))


@dataclass(frozen=True, repr=False)
class _Committed:
    """Everybody's commitment, and the signatures on them, in roster order."""

    to: tuple[bytes, ...]
    signatures: tuple[bytes, ...]


def _committed(own: _Own, hellos: bytes) -> _Committed:
    """Raises: MessageError, FaultyServerError."""
    n = len(own.setup.roster)
    most = messages.limit(messages.Hellos, n)
    found = messages.from_server(messages.Hellos, hellos, own.setup.session, most).hellos
    if len(found) != n:
        raise FaultyServerError(f"expected {n} Hellos, one per party, got {len(found)}")
    return _Committed(tuple(entry.commitment for entry in found), tuple(entry.signature for entry in found))


def _check_signed(own: _Own, committed: _Committed, pinned: tuple[bytes, ...]) -> None:
    """Looks at nothing of this party's own but the keys that it has pinned. Raises: FaultyServerError."""
    for party, (key, commitment, signature) in enumerate(zip(pinned, committed.to, committed.signatures, strict=True)):
        signed = signing.hello(own.setup_digest, party, commitment)
        if not own.policy.signatures.valid(key, signed, signature):
            name = own.setup.roster[party]
            raise FaultyServerError(f"the Hello of {name} is not signed by {name}'s pinned identity")


class Revealing(Once[tuple[_Own, _Committed]]):
    """Waits for everybody's nonce."""

    def enter(self, reveals: bytes) -> Member:
        """Fix the session and derive this party's neighbours.

        Raises: FaultyPartyOrServerError when a nonce is not the one committed to; FaultyServerError.
        """
        own, committed = self._take()
        own.current.check_live()
        n, k = len(own.setup.roster), own.setup.neighbours
        session, ring = own.policy.signatures.once(
            ("reveals", own.setup, own.setup_digest, committed.to, reveals), lambda: _session(own, committed, reveals)
        )
        signer = SigningKey(own.identity)
        peers = around(own.index, n, k, ring)
        membership = Membership(own.setup, session, own.index, signer, own.policy, peers, own.current)
        return Member((membership, 0))


def _session(own: _Own, committed: _Committed, reveals: bytes) -> tuple[bytes, tuple[int, ...] | None]:
    """The session's digest, and the ring that it gives. Raises: MessageError; as :meth:`Revealing.enter`."""
    n = len(own.setup.roster)
    most = messages.limit(messages.Reveals, n)
    nonces = messages.from_server(messages.Reveals, reveals, own.setup.session, most).nonces
    if len(nonces) != n:
        raise FaultyServerError(f"expected {n} nonces, one per party, got {len(nonces)}")
    for party, (commitment, nonce) in enumerate(zip(committed.to, nonces, strict=True)):
        if signing.commitment(own.setup_digest, party, nonce) != commitment:
            name = own.setup.roster[party]
            raise FaultyPartyOrServerError(name, "the nonce is not the one that its Hello committed to")
    session = signing.session_digest(own.setup_digest, committed.to, nonces)
    return session, ring_of(n, own.setup.neighbours, signing.graph_seed(session))


class Member(Once[tuple[Membership, int]]):
    """In a session, between rounds. The number is of the last round that this party took part in."""

    def advertise(self, number: int, *, randomness: Randomness) -> tuple[Member, Advertised, bytes]:
        """Begin round ``number`` with a fresh mask key and a fresh transport key.

        Raises: FaultyServerError when that round is not after the last: a round is never run twice. That does not
        spend the state: a party is not out of the session because the server asked for a wrong round once.
        StateUsedError when the identity has joined a later session.
        """
        for member, last in tuple(self._content):
            member.current.check_live()
            if isinstance(number, bool) or not isinstance(number, int) or not last < number < 1 << 32:
                raise FaultyServerError(f"asked for round {shown(number)} after round {last}")
        member, _ = self._take()
        secret = randomness(32)
        keys = Keys(member, number, secret, PrivateKey(secret), PrivateKey(randomness(32)))
        mask, transport = keys.masking.public(), keys.transport.public()
        signed = signing.advertise(member.session, number, member.index, mask, transport)
        message = messages.Advertise(member.id, number, mask, transport, member.identity.sign(signed))
        return Member((member, number)), Advertised(keys), messages.encode(message)
