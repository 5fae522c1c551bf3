"""The sum under one shared key, with its parties and its server all in this process.

**Trust.** All parties hold one secret key, fresh each session and stepped on each round; the server holds none. The
server must be *honest but curious*: it follows the protocol and looks at everything it handles; and no party may help
it. Then it learns the sum over the survivors, which a surviving party decrypts and reports to it, who they are, and
nothing else, if ring-LWE is hard at the stated parameters. More exactly:

- **One party that shows the server its key opens every vector of every party**, of that session from then on. So does
  one party that the server's operator also runs. With an untrusted server and possibly corrupt parties use the split
  key or ``Masked``.
- A server that does not follow the protocol reads single vectors without any help: it hands one party's ciphertext to a
  party as if it were the sum, and is told what is in it. Worse, a party that decrypts what it is given is a decryption
  oracle, and the ciphertext (0, q/t) decrypts to the secret key. Parties refuse sums that are named after fewer than
  ``min_survivors``, without their own vector, with more noise or larger values than the sum can have, and a second one
  in a round; this catches mistakes, not such a server: ciphertexts can be shifted and scaled by anyone.
- A party sees no other's vector as long as the server gives it sums alone; the one that decrypts sees the sum first,
  and could report another (of values that the survivors could add up to). Nobody checks it.
- Handing out the key withstands a malicious server: fresh X25519 keys signed by identities pinned in each party's
  directory, the seed sealed to each (HKDF-SHA-256, ChaCha20-Poly1305), and a commitment to the seed signed by every
  party before the first vector is encrypted. The dealer makes the key; if it does so badly, all are open.

What it is for: parties that trust each other with their vectors, and a server that must not have them (a rented one,
say); the model of NVFlare, at a tenth of its bytes. Unit: one vector of one round.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.errors import StateUsedError, TooFewSurvivorsError
from choral.protocols.homomorphic.shared import party as steps
from choral.protocols.homomorphic.shared.server import Dealing, SharedServer, Totalling
from choral.protocols.homomorphic.shared.setup import Floats, key_setup, plan_of
from choral.protocols.in_process import ByteCounter
from choral.protocols.interface import Losses, Step, SumResult, SumSpec
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.policy import Policy, check_policy
from choral.protocols.masking.server.opening import Opening
from choral.protocols.masking.signing import Signatures
from choral.protocols.plain import check_submission
from choral.protocols.wire_format import VERSION

SECURITY_BITS = 128
"""Of the ring (SEAL's table), X25519, Ed25519, AES-128 and SHA-256."""

if TYPE_CHECKING:
    from choral.protocols.driver import RoundTerms


class SharedKeyParties:
    """The parties of one session, each in its own state, and their server.

    They agree on ``spec``, and on sums of a majority if not of ``min_survivors``. policy: their own terms, by default
    what these say, and never what the setup says; its directory is filled in here. floats: of CKKS.
    Raises: SpecError; PolicyError where the parties refuse.
    """

    def __init__(
        self,
        spec: SumSpec,
        *,
        min_survivors: int | None = None,
        policy: Policy | None = None,
        floats: Floats | None = None,
    ) -> None:
        self.spec, n = spec, len(spec.parties)
        smallest = n // 2 + 1 if min_survivors is None else checks.whole(min_survivors, "min_survivors", 2, n)
        self.setup = key_setup(spec, session=secrets.token_bytes(16), min_survivors=smallest, floats=floats)
        self.plan, self.floats, self.number = plan_of(n, spec, floats), floats, 0
        self.traffic = ByteCounter()
        own = Masked(corrupt=0, server="semi-honest", min_survivors=min_survivors).policy(spec)
        terms = own if policy is None else check_policy(policy)
        identities = {party: secrets.token_bytes(32) for party in spec.parties}
        self.policy = replace(
            terms,
            directory={party: ed25519_public(identity) for party, identity in identities.items()},
            directory_size=spec.population if terms.directory_size is None else terms.directory_size,
            signatures=Signatures(),
        )
        self.holders: dict[str, steps.Holder] = {}
        self.server = self._open(identities)
        self.policy.signatures.forget()

    def _open(self, identities: Mapping[str, bytes]) -> SharedServer:
        traffic, policy, draw = self.traffic, self.policy, secrets.token_bytes
        opening = Opening(self.setup, policy.directory, policy.signatures)
        joining, agreements, revealing = {}, {}, {}
        for party, identity in identities.items():
            traffic.down(party, opening.invitation)
            joining[party], agreements[party], hello = steps.join(
                opening.invitation, name=party, identity=identity, policy=policy, randomness=draw, floats=self.floats
            )
            opening.receive(party, traffic.up(party, hello))
        gathering, hellos = opening.close()
        for party, raw in traffic.all_down(hellos).items():
            revealing[party], reveal = joining[party].reveal(raw)
            gathering.receive(party, traffic.up(party, reveal))
        opened, reveals = gathering.close()
        dealing, met = Dealing(opened.terms, self.plan), dict[str, Any]()
        for party, raw in traffic.all_down(reveals).items():
            met[party], deal = agreements[party].meet(revealing[party], raw, randomness=draw)
            if deal is not None:
                dealing.receive(party, traffic.up(party, deal))
        confirming, deals = dealing.close()
        for party, raw in traffic.all_down(deals).items():
            met[party], confirm = met[party].receive(raw)
            confirming.receive(party, traffic.up(party, confirm))
        server, confirmations = confirming.close()
        self.holders = {party: met[party].enter(raw) for party, raw in traffic.all_down(confirmations).items()}
        return server

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of every sum under a shared key."""
        setup, plan = self.setup, self.plan
        unseen = "" if self.floats is None else " and must never see a decrypted sum"
        return {
            "name": "homomorphic",
            "key": "shared",
            "scheme": plan.scheme,
            "trust": (
                f"All parties hold one secret key, the server has none{unseen}. The server follows the protocol but"
                " looks at everything, and colludes with no party: one party that does opens the vectors of all"
                f" {len(setup.roster)}. Each party trusts its pinned directory of identities, which in this in-process"
                " run was made by the process itself."
            ),
            "server": "semi-honest",
            "parties": len(setup.roster),
            "corrupt": 0,
            "min_survivors": setup.min_survivors,
            "dropouts": len(setup.roster) - setup.min_survivors,
            "security_bits": SECURITY_BITS,
            "ring_degree": plan.parameters.degree,
            "coefficient_modulus_bits": plan.parameters.modulus.bit_length(),
            "bytes_per_value": round(plan.bytes_per_value, 3),
            "encoding": self.spec.encoding,
            "ciphers": {
                "encryption": "ring-LWE, symmetric with seeds (Microsoft SEAL)",
                "key agreement": "X25519",
                "signatures": "Ed25519",
                "sealed key": "ChaCha20-Poly1305",
                "derivation": "HKDF-SHA-256",
            },
            "protocol_version": VERSION,
        }


class SharedKeyRound:
    """One round, until its sum is encrypted. ``submit`` each present party once, then finish it once."""

    def __init__(self, parties: SharedKeyParties, losses: Losses) -> None:
        self.parties, self.losses = parties, losses
        parties.number += 1
        self.number = parties.number
        self._adding = parties.server.begin(self.number)
        self.encrypted: dict[str, steps.Encrypted] = {}
        self._finished = False

    def submit(self, party: str, vector: Any) -> None:
        """Encrypt the vector and add it to the server's sum.

        Raises: SpecError for an unknown party; StateUsedError the second time, or when a later round has begun;
        InputError for another vector than agreed on, after which the party may submit a right one.
        """
        self._check_current()
        check_submission(party, self.parties.spec, self.encrypted, self.losses, finished=self._finished)
        holders = self.parties.holders
        holders[party], self.encrypted[party], upload = holders[party].encrypt(self.number, vector)
        self._adding.receive(party, self.parties.traffic.up(party, upload))

    def close(self) -> Totalling:
        """Raises: TooFewSurvivorsError, naming the counts and the missing; StateUsedError the second time."""
        self._check_current()
        if self._finished:
            raise StateUsedError("this round is finished")
        self._finished = True
        return self._adding.close()

    def _check_current(self) -> None:
        if self.number != self.parties.number:
            raise StateUsedError(f"round {self.number} ended when round {self.parties.number} began")


class SharedSession(SharedKeyParties):
    """See :class:`choral.protocols.interface.SumSession`: exact sums of integers (BFV) under a shared key.

    min_survivors: fewer vectors than this are never summed; 2 to n, by default a majority. policy: the parties' own
    terms, by default what spec and ``min_survivors`` say.

    Guarantee and trust: see the module. Raises: SpecError when no ring has room for the sum (more than 60 bits), or
    for ``min_survivors`` out of range; PolicyError where the parties refuse.
    """

    @property
    def statement(self) -> Mapping[str, Any]:
        plan = self.plan
        return {
            **self.facts,
            "server_learns": (
                "the sum over the survivors, which a surviving party decrypts and reports, who they are, and who"
                " dropped out"
            ),
            "plaintext_modulus_bits": plan.parameters.plain_modulus.bit_length(),
            "values_per_slot": getattr(plan, "values_per_slot", 1),
            "noise_margin_bits": plan.margin_bits,
            "modulus_bits": self.spec.modulus_bits,
        }

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> SharedRound:
        """A fresh round; an unfinished earlier round is lost.

        lost: as in the seam. A round has no keys or shares of its own, and nobody confirms; "unmasking" is what one
        survivor does, so another is asked where the first is lost.
        """
        del terms  # nobody compares them in this sum
        return SharedRound(self, Losses(lost, self.spec.parties))


class SharedRound(SharedKeyRound):
    """See :class:`choral.protocols.interface.SumRound`. The server holds one encrypted sum, however many parties."""

    def finish(self) -> SumResult:
        """The first survivor that is there opens the sum and reports it.

        Raises: TooFewSurvivorsError, naming the counts and the missing; StateUsedError the second time.
        """
        totalling, traffic = self.close(), self.parties.traffic
        there = [party for party in totalling.survivors if self.losses.takes(party, "unmasking")]
        if not there:
            raise TooFewSurvivorsError(
                "nobody is left to open the sum", survivors=0, needed=1, missing=totalling.survivors
            )
        decryptor, raw = totalling.ask(there[0])
        traffic.down(decryptor, raw)
        totalling.receive(decryptor, traffic.up(decryptor, self.encrypted[decryptor].open(raw)))
        outcome = totalling.close()
        up, down = traffic.take(self.parties.spec.parties)
        return SumResult(total=outcome.total, survivors=outcome.survivors, bytes_up=up, bytes_down=down)
