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
from choral.protocols.masking.ahead.floor import stated_ahead
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.protocols.masking.party_driver import PartyContext
from choral.protocols.masking.policy import Policy, check_policy
from choral.protocols.masking.server.driver import MaskedServerDriver, ServerContext
from choral.protocols.masking.signing import Signatures
from choral.protocols.masking.statement import statement_of

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked


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
        return {**stated, **stated_ahead(setup)} if isinstance(setup, AheadSetup) else stated
