"""The split-key sum with its parties and its server all in this process, each behind its driver."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from choral.protocols.crypto.identity import Identity
from choral.protocols.homomorphic.ring.gaussian import SIGMA
from choral.protocols.homomorphic.split.parameters import SECURITY_BITS, SplitParameters
from choral.protocols.homomorphic.split.party_driver import SplitPartyDriver
from choral.protocols.homomorphic.split.server_driver import SplitServerDriver
from choral.protocols.in_process import DriverSession
from choral.protocols.interface import SumSpec, check_spec
from choral.protocols.masking.in_process import rehearsed
from choral.protocols.masking.policy import Policy
from choral.protocols.masking.signing import Signatures
from choral.protocols.masking.statement import COHORT_TRUST, statement_of

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked


class SplitSession(DriverSession):
    """See :class:`choral.protocols.interface.SumSession`. keys: the masked sum's thresholds and trust."""

    def __init__(self, keys: Masked, spec: SumSpec, policy: Policy | None = None) -> None:
        check_spec(spec)
        self._keys = keys
        self._signatures = Signatures()
        identities = {party: Identity(secrets.token_bytes(32)) for party in spec.parties}
        self._policy = rehearsed(keys, spec, policy, identities, self._signatures)
        self.driver = SplitServerDriver(
            keys,
            spec,
            directory=self._policy.directory,
            randomness=secrets.token_bytes,
            signatures=self._signatures,
        )
        parties = {
            name: SplitPartyDriver(
                keys,
                spec,
                name=name,
                identity=identity,
                policy=self._policy,
                randomness=secrets.token_bytes,
                repeats=False,
            )
            for name, identity in identities.items()
        }
        super().__init__(spec, parties, self.driver)

    @property
    def parameters(self) -> SplitParameters:
        return self.driver.parameters

    @property
    def digest(self) -> bytes:
        """Of everything that was agreed on when the session was opened, every party's nonce included: 32 bytes."""
        return self.driver.digest

    def between_rounds(self) -> None:
        self._signatures.forget()

    @property
    def statement(self) -> Mapping[str, Any]:
        chosen = self.parameters
        masked = dict(
            statement_of(self.driver.setup, self._keys.parameters(len(self.spec.parties), self.spec.population))
        )
        server = "may do whatever it likes" if masked["server"] == "malicious" else "follows the protocol"
        trust = (
            f"Nobody holds a decryption key. The server {server} and may collude with up to {masked['corrupt']} of"
            f" {masked['parties']} parties: together they learn the sum over the survivors, at least"
            f" {masked['min_survivors']} parties, and no single vector of the others, if ring-LWE is hard and the"
            " survivors are not picked by what the ciphertexts hold."
            f"{COHORT_TRUST[masked['cohort']]} Each party trusts its pinned directory of identities, which in this"
            " in-process run was made by the process itself."
        )
        return {
            **masked,
            "name": "homomorphic",
            "trust": trust,
            "key": "split",
            "scheme": "symmetric BFV, each party under its own key; the sum of keys by the masked sum",
            "server_learns": "the sum over the survivors, the sums of their keys and errors, and who they are",
            "security_bits": min(SECURITY_BITS, masked["security_bits"]),
            "security_estimate": (
                "the homomorphic encryption standard's cost model; core-SVP: 100 to 106; quantum sieves: 88 to 94"
            ),
            "ring_degree": chosen.degree,
            "coefficient_modulus_bits": chosen.modulus_bits,
            "plaintext_modulus_bits": chosen.slots * chosen.slot_bits,
            "values_per_slot": chosen.slots,
            "noise_margin_bits": round(chosen.margin_bits, 1),
            "error_width": float(SIGMA),
            "bytes_per_value": round(chosen.bytes_per_value, 3),
            "modulus_bits": chosen.slot_bits,
            "encoding": chosen.spec.encoding,
        }
