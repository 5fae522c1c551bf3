"""The masked sum with its parties and its server all in this process, each behind its driver."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from choral.protocols.crypto.identity import Identity
from choral.protocols.in_process import DriverSession
from choral.protocols.interface import SumSpec, check_spec
from choral.protocols.masking.party_driver import MaskedPartyDriver
from choral.protocols.masking.policy import Policy, check_policy
from choral.protocols.masking.server.driver import MaskedServerDriver
from choral.protocols.masking.signing import Signatures
from choral.protocols.masking.statement import statement_of

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked


class MaskedSession(DriverSession):
    """See :class:`choral.protocols.interface.SumSession`.

    Identities are made here and live as long as the session; every round has fresh secrets, and the keys of the next
    round ride on the last message of this one.
    """

    def __init__(self, config: Masked, spec: SumSpec, policy: Policy | None = None) -> None:
        check_spec(spec)
        self._config = config
        self._signatures = Signatures()
        identities = {party: Identity(secrets.token_bytes(32)) for party in spec.parties}
        # Each party's terms come from the settings, or from whoever runs the rehearsal: never from the setup.
        self._policy = rehearsed(config, spec, policy, identities, self._signatures)
        self.driver = MaskedServerDriver(
            config,
            spec,
            directory=self._policy.directory,
            randomness=secrets.token_bytes,
            signatures=self._signatures,
        )
        parties = {
            name: MaskedPartyDriver(
                name=name, identity=identity, policy=self._policy, randomness=secrets.token_bytes, repeats=False
            )
            for name, identity in identities.items()
        }
        super().__init__(spec, parties, self.driver)

    @property
    def statement(self) -> Mapping[str, Any]:
        return statement_of(self.driver.setup, self._config.parameters(len(self.spec.parties), self.spec.population))

    @property
    def digest(self) -> bytes:
        """Of everything that was agreed on when the session was opened, every party's nonce included: 32 bytes."""
        return self.driver.digest

    def between_rounds(self) -> None:
        self._signatures.forget()


def rehearsed(
    config: Masked,
    spec: SumSpec,
    policy: Policy | None,
    identities: Mapping[str, Identity],
    signatures: Signatures,
) -> Policy:
    """The policy that all parties of one process have: what was given, or the settings say, and their public keys."""
    terms = check_policy(policy) if policy is not None else config.policy(spec)
    return replace(
        terms,
        directory={party: identity.public for party, identity in identities.items()},
        directory_size=spec.population if terms.directory_size is None else terms.directory_size,
        signatures=signatures,
    )
