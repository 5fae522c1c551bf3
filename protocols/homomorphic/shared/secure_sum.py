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

from collections.abc import Mapping
from functools import partial
from typing import Any

from choral.protocols.homomorphic.shared.party_driver import SharedPartyDriver
from choral.protocols.homomorphic.shared.server import SharedKey, SharedServerDriver
from choral.protocols.homomorphic.shared.setup import Floats, plan_of
from choral.protocols.interface import SumSpec, check_spec
from choral.protocols.masking.in_process import RehearsedSession
from choral.protocols.masking.policy import Policy
from choral.protocols.wire_format import VERSION

SECURITY_BITS = 128
"""Of the ring (SEAL's table), X25519, Ed25519, AES-128 and SHA-256."""


class SharedSession(RehearsedSession):
    """See :class:`choral.protocols.interface.SumSession`: exact sums of integers (BFV), or sums of ``floats`` (CKKS).

    A round has no keys or shares of its own, and nobody confirms; "unmasking" is what one survivor does, so another is
    asked where the first drops out.

    min_survivors: fewer vectors than this are never summed; 2 to n, by default a majority. policy: the parties' own
    terms, by default what spec and ``min_survivors`` say, and never what the setup says.

    Raises: SpecError when no ring has room for the sum (more than 60 bits), or for ``min_survivors`` out of range;
    PolicyError where the parties refuse.
    """

    parties: Mapping[str, SharedPartyDriver]

    def __init__(
        self,
        spec: SumSpec,
        *,
        min_survivors: int | None = None,
        policy: Policy | None = None,
        floats: Floats | None = None,
    ) -> None:
        check_spec(spec)
        self.plan, self._floats = plan_of(len(spec.parties), spec, floats), floats
        config = SharedKey(min_survivors=min_survivors, floats=floats)
        party, server = partial(SharedPartyDriver, floats=floats), partial(SharedServerDriver, config, spec)
        super().__init__(config, spec, policy, party=party, server=server)

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of every sum under a shared key."""
        setup, plan = self.server.setup, self.plan
        unseen = "" if self._floats is None else " and must never see a decrypted sum"
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
