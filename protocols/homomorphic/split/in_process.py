"""The split-key sum with its parties and its server all in this process."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from choral.protocols.driver import RoundTerms
from choral.protocols.errors import PolicyError
from choral.protocols.homomorphic.ring.gaussian import SIGMA, TAIL
from choral.protocols.homomorphic.split.parameters import SECURITY_BITS, SplitParameters, choose
from choral.protocols.homomorphic.split.party_and_server import Collector, SplitRound, encrypt
from choral.protocols.in_process import ByteCounter
from choral.protocols.interface import IntVector, Step, SumResult, SumSpec
from choral.protocols.masking.in_process import MaskedSession
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.policy import Policy, check_policy
from choral.protocols.masking.signing import digest
from choral.protocols.masking.statement import COHORT_TRUST

if TYPE_CHECKING:
    import torch


def key_spec(parameters: SplitParameters) -> SumSpec:
    """What the masked sum of the keys adds up: its ``encoding`` binds the signatures on it to the long vector's
    terms."""
    return SumSpec(
        parties=parameters.spec.parties,
        length=parameters.degree,
        bound=TAIL,
        encoding=f"split-key sum, terms {digest('split/terms', parameters.terms().encode()).hex()}",
        directory=parameters.spec.directory,
    )


class SplitSession:
    """See :class:`choral.protocols.interface.SumSession`. keys: the masked sum's thresholds and trust.

    Each party derives the ring and its parameters from the spec itself (:func:`split_parameters.choose`); none are
    taken from the server.
    """

    def __init__(self, keys: Masked, spec: SumSpec, policy: Policy | None = None) -> None:
        self.parameters = choose(spec)
        sum_of_keys = key_spec(self.parameters)
        if policy is not None:
            check_policy(policy).check_vector(spec.length, spec.bound, spec.modulus_bits, spec.encoding)
            if policy.wraps_at != spec.wraps_at:
                raise PolicyError("this party agreed to another modulus at which the sum may wrap")
            # The keys are a vector of their own, whose terms each party derives from those of the long one.
            own = keys.policy(sum_of_keys)
            of_keys = ("maximum_modulus_bits", "maximum_bound", "maximum_length", "wraps_at", "encoding")
            policy = replace(policy, **{name: getattr(own, name) for name in of_keys})
        self.masked: MaskedSession = keys.open(sum_of_keys, policy=policy)

    @property
    def statement(self) -> Mapping[str, Any]:
        masked, chosen = dict(self.masked.statement), self.parameters
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

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> SplitSumRound:
        """Keys and shares of a fresh round; an unfinished earlier round is lost.

        lost: as in the seam; all steps are the masked sum's, and at "vector" neither ciphertext nor key is sent.
        Raises: SpecError; TooFewSurvivorsError when too few advertise or share.
        """
        return SplitSumRound(self, lost, terms)


class SplitSumRound:
    """See :class:`choral.protocols.interface.SumRound`. One party's ciphertext at a time is in memory beside the
    sum."""

    def __init__(
        self, session: SplitSession, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None
    ) -> None:
        self._spec = session.parameters.spec
        self._masked = session.masked.begin(lost, terms)
        self._terms = SplitRound(
            parameters=session.parameters, session=session.masked.digest, number=self._masked.number
        )
        self._collector = Collector(self._terms, self._spec.parties)
        self._traffic = ByteCounter()

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Encrypt the vector under a fresh key, send it, then send the key into the masked sum.

        Raises: SpecError for an unknown party; StateUsedError the second time, or when a later round has begun;
        InputError for another vector than agreed on, after which the party may submit a right one.
        """
        self._masked.check(party)
        self._collector.restart(party)  # what an earlier try that failed midway has left
        encrypted = encrypt(vector, self._terms, randomness=secrets.token_bytes)
        for raw in encrypted.messages:
            self._collector.receive(party, self._traffic.up(party, raw))
        self._masked.submit(party, encrypted.key)
        self._collector.include(party)

    def finish(self) -> SumResult:
        """Recover the sum of keys from the dropouts, and open the sum with it.

        Raises: TooFewSurvivorsError, naming the counts and the missing; GarbledSumError; StateUsedError the second
        time.
        """
        keys = self._masked.finish()
        total = self._collector.open(keys.total, keys.survivors)
        up, down = self._traffic.take(self._spec.parties)
        return SumResult(
            total=total,
            survivors=keys.survivors,
            bytes_up={party: up[party] + keys.bytes_up[party] for party in up},
            bytes_down={party: down[party] + keys.bytes_down[party] for party in down},
        )
