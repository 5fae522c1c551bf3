"""All parties of a shared-key session in one process, each in its own state, and their server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.errors import SpecError, StateUsedError
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared import party as steps
from choral.protocols.homomorphic.shared.party_round import Encrypted, Keyed
from choral.protocols.homomorphic.shared.server import Opening, Session
from choral.protocols.homomorphic.shared.server_round import Adding
from choral.protocols.homomorphic.shared.setup import Plan, SharedPolicy, plan_of
from choral.protocols.masking import messages as base
from choral.protocols.masking.in_process import ByteCounter
from choral.protocols.masking.signing import Signatures

SECURITY_BITS = 128
"""Of the ring (SEAL's table), X25519, Ed25519, AES-128 and SHA-256."""


def smallest_sum(n: int, min_survivors: int | None) -> int:
    """``min_survivors``, by default a majority. Raises: SpecError outside 2 to n."""
    if min_survivors is None:
        return max(2, n // 2 + 1)
    wanted = checks.whole(min_survivors, "min_survivors", 2, base.MAX_PARTIES)
    if wanted > n:
        raise SpecError(
            f"expected 2 <= min_survivors <= {n} parties, got {wanted}",
            hint="leave it out to have a majority of the parties",
        )
    return wanted


def make_setup(
    parties: tuple[str, ...],
    length: int,
    encoding: str,
    plan: Plan,
    min_survivors: int,
    session: bytes,
    *,
    bound: int = 0,
    magnitude: float = 0.0,
    precision: float = 0.0,
) -> wire.KeySetup:
    return wire.KeySetup(
        session=session,
        roster=parties,
        length=length,
        scheme=plan.scheme,
        bound=bound,
        magnitude=magnitude,
        precision=precision,
        min_survivors=min_survivors,
        degree=plan.parameters.degree,
        primes=plan.parameters.primes,
        special=plan.parameters.special,
        plain_modulus=plan.parameters.plain_modulus,
        encoding=encoding,
    )


class Parties:
    """The parties of one session, each in its own state, and their server.

    policy: the parties' own terms, which do not come from the setup; their directory is filled in here.
    """

    def __init__(self, setup: wire.KeySetup, policy: SharedPolicy) -> None:
        self.setup = setup
        self.plan = plan_of(setup)
        self.traffic = ByteCounter()
        self.number = 0
        identities = {party: secrets.token_bytes(32) for party in setup.roster}
        directory = {party: ed25519_public(identity) for party, identity in identities.items()}
        policy = replace(policy, directory=directory, signatures=Signatures(), checked=set())
        self.holders: dict[str, steps.Holder] = {}
        self.server = self._open(identities, policy)
        policy.signatures.forget()
        policy.checked.clear()

    def _open(self, identities: Mapping[str, bytes], policy: SharedPolicy) -> Session:
        traffic = self.traffic
        opening = Opening(self.setup, policy.directory, policy.signatures)
        joining = {}
        for party, identity in identities.items():
            traffic.down(party, opening.invitation)
            joining[party], hello = steps.join(
                opening.invitation, name=party, identity=identity, policy=policy, randomness=secrets.token_bytes
            )
            opening.receive(party, traffic.up(party, hello))
        dealing, hellos = opening.close()
        met: dict[str, Any] = {}
        answers: dict[str, tuple[bytes, ...]] = {}
        for party, raw in traffic.all_down(hellos).items():
            met[party], answers[party] = joining[party].meet(raw, randomness=secrets.token_bytes)
        dealer = self.setup.roster[0]
        deal, confirm = answers[dealer]
        dealing.receive(dealer, traffic.up(dealer, deal))
        confirming, dealt = dealing.close()
        confirming.receive(dealer, traffic.up(dealer, confirm))
        for party, raw in traffic.all_down(dealt).items():
            met[party], confirm = met[party].receive(raw)
            confirming.receive(party, traffic.up(party, confirm))
        session, confirmations = confirming.close()
        for party, raw in traffic.all_down(confirmations).items():
            self.holders[party] = met[party].enter(raw)
        return session

    def begin(self) -> tuple[int, Adding]:
        self.number += 1
        return self.number, self.server.begin(self.number)

    def key(self, party: str, number: int) -> Keyed:
        self.holders[party], keyed = self.holders[party].begin(number)
        return keyed

    def check_current(self, number: int) -> None:
        if number != self.number:
            raise StateUsedError(f"round {number} ended when round {self.number} began")

    def down(self, party: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for raw in pieces:
            self.traffic.down(party, raw)
            yield raw


def encrypt_and_send(
    parties: Parties, adding: Adding, keyed: dict[str, Keyed], number: int, party: str, vector: Any
) -> Encrypted:
    """One party's vector, piece by piece. A vector that is refused leaves the party's key for a right one."""
    if party not in keyed:
        keyed[party] = parties.key(party, number)
    encrypted, pieces = keyed[party].encrypt(vector)
    del keyed[party]
    for raw in pieces:
        adding.receive(party, parties.traffic.up(party, raw))
    return encrypted


def facts_of(parties: Parties) -> dict[str, Any]:
    setup, plan = parties.setup, parties.plan
    return {
        "name": "homomorphic",
        "key": "shared",
        "scheme": plan.scheme,
        "server": "semi-honest",
        "parties": len(setup.roster),
        "corrupt": 0,
        "min_survivors": setup.min_survivors,
        "dropouts": len(setup.roster) - setup.min_survivors,
        "security_bits": SECURITY_BITS,
        "ring_degree": plan.parameters.degree,
        "coefficient_modulus_bits": plan.parameters.modulus.bit_length(),
        "bytes_per_value": round(plan.bytes_per_value, 3),
        "encoding": setup.encoding,
        "ciphers": {
            "encryption": "ring-LWE, symmetric with seeds (Microsoft SEAL)",
            "key agreement": "X25519",
            "signatures": "Ed25519",
            "sealed key": "ChaCha20-Poly1305",
            "derivation": "HKDF-SHA-256",
        },
        "protocol_version": base.VERSION,
    }
