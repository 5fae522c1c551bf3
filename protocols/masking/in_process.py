"""The masked sum with its parties and its server all in this process, each behind its driver."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import PartyDriver
from choral.protocols.in_process import DriverSession
from choral.protocols.interface import SumSpec, check_spec
from choral.protocols.masking import messages
from choral.protocols.masking.ahead.floor import stated_ahead
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.protocols.masking.parameters import Parameters
from choral.protocols.masking.policy import COHORT_TRUST, PartyContext, Policy, check_policy
from choral.protocols.masking.server.driver import MaskedServerDriver, ServerContext
from choral.protocols.masking.signing import Signatures

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked

CIPHER_BITS = 128
"""Of AES-128, X25519, Ed25519 and SHA-256 commitments: no choice of neighbours makes the whole stronger."""


class RehearsedSession(DriverSession):
    """Parties under one policy and their server, as which drivers the kind of sum says.

    Identities are made here and live as long as the session; every round has fresh secrets.
    """

    server: MaskedServerDriver

    def __init__(
        self,
        config: Masked,
        spec: SumSpec,
        policy: Policy | None,
        *,
        party: Callable[[PartyContext], PartyDriver],
        server: Callable[[ServerContext], MaskedServerDriver],
    ) -> None:
        """config: whose policy all have if none is given; the sum of the keys', where they are what is masked."""
        check_spec(spec)
        draw = secrets.token_bytes
        self._config, self._signatures = config, Signatures(shared=True)
        identities = {name: Identity(draw(32)) for name in spec.parties}
        # Each party's terms come from the settings, or from whoever runs the rehearsal: never from the setup.
        terms = config.policy(spec) if policy is None else check_policy(policy)
        self._policy = own = replace(
            terms,
            directory={name: identity.public for name, identity in identities.items()},
            directory_size=spec.population if terms.directory_size is None else terms.directory_size,
            signatures=self._signatures,
        )
        parties = {
            name: party(PartyContext(name=name, identity=identity, policy=own, randomness=draw, repeats=False))
            for name, identity in identities.items()
        }
        context = ServerContext(directory=own.directory, randomness=draw, signatures=self._signatures)
        super().__init__(spec, parties, server(context))

    @property
    def statement(self) -> Mapping[str, Any]:
        return statement_of(self.server.setup, self._config.parameters(len(self.spec.parties), self.spec.population))

    @property
    def digest(self) -> bytes:
        """Of everything that was agreed on when the session was opened, every party's nonce included: 32 bytes."""
        return self.server.digest

    def between_rounds(self) -> None:
        self._signatures.forget()


class MaskedSession(RehearsedSession):
    """See :class:`choral.protocols.interface.SumSession`. The keys of a round ride on the last message before it."""

    def __init__(self, config: Masked, spec: SumSpec, policy: Policy | None = None) -> None:
        super().__init__(config, spec, policy, party=config._party(spec), server=config._server(spec))

    @property
    def statement(self) -> Mapping[str, Any]:
        setup, stated = self.server.setup, super().statement
        return (
            {**stated, **stated_ahead(setup, self._config.min_survivors)} if isinstance(setup, AheadSetup) else stated
        )


def statement_of(setup: messages.SumSetup, chosen: Parameters) -> Mapping[str, Any]:
    """JSON-able facts of a session with this setup. chosen: what its threshold and graph achieve."""
    server = "may do whatever it likes" if setup.server == "malicious" else "follows the protocol"
    return {
        "name": "masked",
        "trust": (
            f"The server {server} and may collude with up to {setup.corrupt} of {len(setup.roster)} parties:"
            f" together they learn the sum over the survivors, at least {setup.min_survivors} parties, and no"
            f" single vector of the others.{COHORT_TRUST[setup.cohort]} Each party trusts its pinned directory of"
            " identities, which in this in-process run was made by the process itself."
        ),
        "server_learns": "the sum over the survivors, who they are, and who dropped out",
        "server": setup.server,
        "parties": len(setup.roster),
        "threshold": setup.threshold,
        "neighbours": setup.neighbours,
        "graph": "complete" if setup.complete else "Harary",
        "corrupt": setup.corrupt,
        "directory": setup.population,
        "cohort": setup.cohort,
        "dropouts": setup.dropouts,
        "min_survivors": setup.min_survivors,
        "security_bits": round(min(CIPHER_BITS, chosen.security_bits), 1),
        "correctness_bits": round(chosen.correctness_bits, 1) if chosen.correctness_bits < CIPHER_BITS else None,
        "modulus_bits": setup.modulus_bits,
        "encoding": setup.encoding,
        "ciphers": {
            "mask stream": "AES-128-CTR",
            "key agreement": "X25519",
            "signatures": "Ed25519",
            "sealed shares": "ChaCha20-Poly1305",
            "derivation": "HKDF-SHA-256",
            "secret sharing": "Shamir over 2^256 + 297",
        },
        "protocol_version": messages.VERSION,
    }
