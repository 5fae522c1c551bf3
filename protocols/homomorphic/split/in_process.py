"""The split-key sum with its parties and its server all in this process, each behind its driver."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from choral.protocols.homomorphic.ring.gaussian import SIGMA
from choral.protocols.homomorphic.split.parameters import SECURITY_BITS, SplitParameters
from choral.protocols.homomorphic.split.party_driver import SplitPartyDriver
from choral.protocols.homomorphic.split.server_driver import SplitServerDriver
from choral.protocols.interface import SumSpec
from choral.protocols.masking.in_process import RehearsedSession
from choral.protocols.masking.policy import COHORT_TRUST, Policy

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked


class SplitSession(RehearsedSession):
    """See :class:`choral.protocols.interface.SumSession`. keys: the masked sum's thresholds and trust."""

    server: SplitServerDriver

    def __init__(self, keys: Masked, spec: SumSpec, policy: Policy | None = None) -> None:
        party, server = partial(SplitPartyDriver, keys, spec), partial(SplitServerDriver, keys, spec)
        super().__init__(keys, spec, policy, party=party, server=server)

    @property
    def parameters(self) -> SplitParameters:
        return self.server.parameters

    @property
    def statement(self) -> Mapping[str, Any]:
        chosen = self.parameters
        masked = super().statement
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
