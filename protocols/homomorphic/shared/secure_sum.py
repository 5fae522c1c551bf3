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
from typing import TYPE_CHECKING, Any

from choral.protocols.errors import SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.homomorphic.shared import bfv
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared.in_process import Parties, encrypt_and_send, facts_of, make_setup, smallest_sum
from choral.protocols.homomorphic.shared.party_round import Encrypted, Keyed
from choral.protocols.homomorphic.shared.server_round import Totalling
from choral.protocols.homomorphic.shared.setup import Plan, SharedPolicy, shared_policy
from choral.protocols.interface import IntVector, Losses, Step, SumResult, SumSpec
from choral.protocols.masking.policy import Policy
from choral.protocols.plain import check_submission

if TYPE_CHECKING:
    import torch


def key_setup(spec: SumSpec, *, min_survivors: int | None, session: bytes) -> wire.KeySetup:
    """The terms of an exact sum, which every party signs. session: 16 fresh random bytes. Raises: SpecError."""
    plan = bfv.choose(len(spec.parties), spec.bound, spec.length)
    smallest = smallest_sum(len(spec.parties), min_survivors)
    return make_setup(spec.parties, spec.length, spec.encoding, plan, smallest, session, bound=spec.bound)


class SharedSession:
    """See :class:`choral.protocols.interface.SumSession`: exact sums of integers (BFV) under a shared key.

    min_survivors: fewer vectors than this are never summed; 2 to n, by default a majority. policy: the parties' own
    terms, by default what spec and ``min_survivors`` say.

    Guarantee and trust: see the module. Raises: SpecError when no ring has room for the sum (more than 60 bits), or
    for ``min_survivors`` out of range.
    """

    def __init__(self, spec: SumSpec, *, min_survivors: int | None = None, policy: Policy | None = None) -> None:
        self.spec = spec
        setup = key_setup(spec, min_survivors=min_survivors, session=secrets.token_bytes(16))
        if policy is None:
            own = SharedPolicy(
                minimum_cohort=min_survivors or 2,
                maximum_bound=spec.bound,
                maximum_length=spec.length,
                encoding=spec.encoding,
            )
        else:
            own = shared_policy(policy)
        self._parties = Parties(setup, own)

    @property
    def plan(self) -> Plan:
        return self._parties.plan

    @property
    def statement(self) -> Mapping[str, Any]:
        plan = self.plan
        facts = {
            "trust": (
                "All parties hold one secret key, the server has none. The server follows the protocol but looks at"
                f" everything, and colludes with no party: one party that does opens the vectors of all"
                f" {len(self.spec.parties)}. Each party trusts its pinned directory of identities, which in this"
                " in-process run was made by the process itself."
            ),
            "server_learns": (
                "the sum over the survivors, which a surviving party decrypts and reports, who they are, and who"
                " dropped out"
            ),
        }
        exact = {
            "plaintext_modulus_bits": plan.parameters.plain_modulus.bit_length(),
            "values_per_slot": getattr(plan, "values_per_slot", 1),
            "noise_margin_bits": plan.margin_bits,
            "modulus_bits": self.spec.modulus_bits,
        }
        return {**facts_of(self._parties), **facts, **exact}

    def begin(self, lost: Mapping[str, Step] | None = None) -> SharedRound:
        """A fresh round; an unfinished earlier round is lost.

        lost: as in the seam. A round has no keys or shares of its own, and nobody confirms; "unmasking" is what one
        survivor does, so another is asked where the first is lost.
        """
        return SharedRound(self._parties, self.spec, Losses(lost, self.spec.parties))


class SharedRound:
    """See :class:`choral.protocols.interface.SumRound`. The server holds one encrypted sum, however many parties."""

    def __init__(self, parties: Parties, spec: SumSpec, losses: Losses) -> None:
        self._parties = parties
        self._spec, self._losses = spec, losses
        self._number, self._adding = parties.begin()
        self._keyed: dict[str, Keyed] = {}
        self._encrypted: dict[str, Encrypted] = {}
        self._finished = False

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Encrypt the vector and add it to the server's sum.

        Raises: SpecError for an unknown party; StateUsedError the second time, or when a later round has begun;
        InputError for another vector than agreed on, after which the party may submit a right one.
        """
        self._parties.check_current(self._number)
        check_submission(party, self._spec, self._encrypted, self._losses, finished=self._finished)
        self._encrypted[party] = encrypt_and_send(self._parties, self._adding, self._keyed, self._number, party, vector)

    def finish(self) -> SumResult:
        """The first survivor that is there opens the sum and reports it.

        Raises: TooFewSurvivorsError, naming the counts and the missing; StateUsedError the second time.
        """
        self._parties.check_current(self._number)
        if self._finished:
            raise StateUsedError("this round is finished")
        self._finished = True
        parties = self._parties
        totalling = self._adding.close()
        if not isinstance(totalling, Totalling):
            raise SpecError("an exact sum was expected")
        there = [party for party in totalling.survivors if self._losses.takes(party, "unmasking")]
        if not there:
            raise TooFewSurvivorsError(
                "nobody is left to open the sum", survivors=0, needed=1, missing=totalling.survivors
            )
        decryptor, pieces = totalling.ask(there[0])
        for raw in self._encrypted[decryptor].open(parties.down(decryptor, pieces)):
            totalling.receive(decryptor, parties.traffic.up(decryptor, raw))
        outcome = totalling.close()
        up, down = parties.traffic.take(self._spec.parties)
        return SumResult(total=outcome.total, survivors=outcome.survivors, bytes_up=up, bytes_down=down)
