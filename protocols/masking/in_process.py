"""``Masked``: the front door of the masked sum, and its parties and server all in this process."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.errors import SpecError, StateUsedError
from choral.protocols.interface import IntVector, Losses, Step, SumResult, SumSpec, check_spec
from choral.protocols.masking import messages
from choral.protocols.masking.parameters import (
    CORRECTNESS_BITS,
    SECURITY_BITS,
    SERVERS,
    Cohort,
    InfeasibleError,
    Parameters,
    choose,
    colluding,
    counted,
    least_threshold,
)
from choral.protocols.masking.party import Member, join
from choral.protocols.masking.party_round import Advertised, Uploaded
from choral.protocols.masking.policy import DRAWS, Policy, check_policy
from choral.protocols.masking.server import Opening, ServerSession
from choral.protocols.masking.server_round import Uploading
from choral.protocols.masking.signing import Signatures
from choral.protocols.plain import check_submission
from choral.protocols.tap import show

if TYPE_CHECKING:
    import torch

CIPHER_BITS = 128
"""Of AES-128, X25519, Ed25519 and SHA-256 commitments: no choice of neighbours makes the whole stronger."""

COHORT_TRUST = {
    "everyone": "",
    "chosen": " The server chose this roster out of all parties, and so may have put every one that colludes into it.",
    "random": (
        " The server is taken to be semi-honest in the choice of the cohort: that it drew the roster at random is taken"
        " on its word, and one that picks colluders by hand reads single vectors."
    ),
}
"""What is said of each way to make a roster."""


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The server learns the sum over the survivors and no single vector (Bonawitz et al. 2017, Bell et al. 2020).

    min_survivors: fewer vectors than this are never summed; 2 to n. Default: a majority of the parties, so that no
        round can be summed over two sets without a common party, or what ``dropouts`` leave where that is less. Where
        it is more, the threshold counts, and so do corrupt + 2, below which a sum could hold a single honest vector.
    corrupt: how many parties may collude with the server: a count (int), or a fraction (float, rounded up) of all the
        parties that there are (``spec.directory``), **not** of a roster that the server has made of some of them.
    dropouts: how many of the roster may vanish in a round; a count, or a fraction of the roster (float, rounded up):
        too few cost rounds, not privacy.
        Defaults: up to 10 parties (n - 1) // 3 of each, so that 3 parties withstand the server alone and one dropout,
        4 to 6 one colluder and one dropout, 10 three and three; for more parties one tenth of each; no more dropouts
        than ``min_survivors`` leaves room for, and in a cohort no more than the threshold does.
    server: "malicious" (it does what it likes) or "semi-honest" (it follows the protocol and looks at everything).
        The second allows more dropouts; signatures and consistency are checked in both.
    cohort: of a roster that is not everybody. "chosen": the server may have picked it to have all colluders in it.
        "random": it is taken on trust that the server drew it at random (*semi-honest in the choice of the cohort*),
        and a fraction, the default too, becomes what such a draw has but for 2^-40. Signed by the parties and stated.

    Guarantee: what ``server`` and up to ``corrupt`` parties see together is independent of the other survivors' vectors
    but for their sum, under the assumptions of docs/secure-sums.md. Unit: one vector of one round. The sum itself may
    say much about one vector when few are in it; that is the matter of differential privacy.

    Raises: SpecError for a setting of another type or out of range; from ``open`` also when no threshold withstands
    those numbers at once, or ``min_survivors`` and ``dropouts`` together are more than the parties.
    """

    min_survivors: int | None = None
    corrupt: int | float | None = None
    dropouts: int | float | None = None
    server: Literal["semi-honest", "malicious"] = "malicious"
    cohort: Literal["chosen", "random"] = "chosen"

    def __post_init__(self) -> None:
        checks.one_of(self.server, "server", SERVERS)
        checks.one_of(self.cohort, "cohort", DRAWS)
        smallest = checks.optional(self.min_survivors, "min_survivors", 2, messages.MAX_PARTIES)
        object.__setattr__(self, "min_survivors", smallest)
        for name in ("corrupt", "dropouts"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.share(value, name))

    @property
    def name(self) -> str:
        return "masked"

    def corrupt_of(self, population: int) -> int | float:
        """``corrupt``, or its default for so many parties."""
        if self.corrupt is not None:
            return self.corrupt
        return (population - 1) // 3 if population <= 10 else 0.1

    def parameters(self, n: int, population: int | None = None) -> Parameters:
        """The neighbours and threshold for a roster of ``n`` parties, of so many in all. Raises: SpecError."""
        if self.min_survivors is not None and self.min_survivors > n:
            raise SpecError(
                f"expected 2 <= min_survivors <= {n} parties, got {self.min_survivors}",
                hint="leave it out to have a majority of the parties",
            )
        population = n if population is None else population
        default = (n - 1) // 3 if n <= 10 else counted(0.1, n)
        corrupt = colluding(self.corrupt_of(population), population, n, self._how(n, population))
        dropouts = min(default, n - (self.min_survivors or 2)) if self.dropouts is None else self.dropouts
        if self.dropouts is None and population > n:
            dropouts = max(0, min(dropouts, n - least_threshold(n, corrupt, self.server), n - corrupt - 2))
        try:
            return choose(n, corrupt=corrupt, dropouts=dropouts, server=self.server)
        except SpecError as error:
            if population == n:
                raise
            raise InfeasibleError(
                f"{error} ({corrupt} of {population} parties may collude, and the server may have put them all into a"
                f" roster of {n})"
                if self.cohort == "chosen"
                else f"{error} ({corrupt} colluders may be in a roster of {n} drawn from {population} parties)",
                hint="ask everybody or more parties; say how many may collude at most (corrupt, a count); or take the"
                ' server\'s word that it draws at random (cohort="random")',
            ) from None

    def _how(self, n: int, population: int) -> Cohort:
        return "everyone" if population == n else self.cohort

    def setup(self, spec: SumSpec, *, session: bytes) -> messages.SumSetup:
        """The terms that every party signs. session: 16 fresh random bytes. Raises: SpecError."""
        n = len(spec.parties)
        chosen = self.parameters(n, spec.population)
        left = n - chosen.dropouts
        wanted = min(n // 2 + 1, left) if self.min_survivors is None else self.min_survivors
        if wanted > left:
            raise SpecError(
                f"{chosen.dropouts} dropouts leave {left} of {n} parties, fewer than min_survivors = {wanted}",
                hint="expect fewer dropouts, or accept a smaller sum",
            )
        if chosen.corrupt + 2 > left:
            raise SpecError(
                f"{chosen.corrupt} corrupt and {chosen.dropouts} dropouts of {n} parties may leave one honest vector"
                " in the sum",
                hint="expect fewer corrupt parties or fewer dropouts",
            )
        whole = spec.population == n
        return messages.SumSetup(
            session=session,
            roster=spec.parties,
            length=spec.length,
            bound=spec.bound,
            modulus_bits=spec.modulus_bits,
            neighbours=chosen.neighbours,
            threshold=chosen.threshold,
            min_survivors=max(2, wanted, chosen.threshold, chosen.corrupt + 2),
            corrupt=chosen.corrupt,
            dropouts=chosen.dropouts,
            server=self.server,
            security_bits=SECURITY_BITS,
            correctness_bits=CORRECTNESS_BITS,
            encoding=spec.encoding,
            cohort=self._how(n, spec.population),
            directory=None if whole else spec.population,
        )

    def policy(self, spec: SumSpec) -> Policy:
        """What these settings ask of a setup, as a party holds them that was given the settings and the spec.

        From these alone, never from a setup: what the server proposes is what it is held against.
        """
        return Policy(
            corrupt=self.corrupt_of(spec.population),
            cohort=self.cohort,
            server=self.server,
            minimum_cohort=self.min_survivors or 2,
            maximum_modulus_bits=spec.modulus_bits,
            maximum_bound=spec.bound,
            maximum_length=spec.length,
            wraps_at=spec.wraps_at,
            encoding=spec.encoding,
        )

    def open(self, spec: SumSpec, *, policy: Policy | None = None) -> MaskedSession:
        """policy: the parties' own terms, by default those of :meth:`policy`. Its directory is filled in here, where
        identities are made.

        Raises: SpecError; PolicyError where the parties refuse.
        """
        return MaskedSession(self, spec, policy)


class MaskedSession:
    """See :class:`choral.protocols.interface.SumSession`. All parties are played in this process, each in its own
    state.

    Identities are made here and live as long as the session; every round has fresh secrets, and the keys of the next
    round ride on the last message of this one.
    """

    def __init__(self, config: Masked, spec: SumSpec, policy: Policy | None = None) -> None:
        check_spec(spec)
        setup = config.setup(spec, session=secrets.token_bytes(16))
        self._parameters = config.parameters(len(spec.parties), spec.population)
        self._setup = setup
        self.spec = spec
        self.traffic = ByteCounter()
        identities = {party: secrets.token_bytes(32) for party in spec.parties}
        signatures = Signatures()
        # Each party's terms come from the settings, or from whoever runs the rehearsal: never from the setup.
        terms = check_policy(policy) if policy is not None else config.policy(spec)
        self._policy = replace(
            terms,
            directory={party: ed25519_public(identity) for party, identity in identities.items()},
            directory_size=spec.population if terms.directory_size is None else terms.directory_size,
            signatures=signatures,
        )
        self.members: dict[str, Member] = {}
        self.early: dict[str, tuple[int, Advertised, bytes]] = {}
        self.following: Mapping[int, messages.Following] = {}
        self.number = 0
        self.server = self._open(identities, signatures)

    @property
    def statement(self) -> Mapping[str, Any]:
        setup, chosen = self._setup, self._parameters
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

    @property
    def digest(self) -> bytes:
        """Of everything that was agreed on when the session was opened, every party's nonce included: 32 bytes."""
        return self.server.terms.session

    def begin(self, lost: Mapping[str, Step] | None = None) -> MaskedRound:
        """Keys and shares of a fresh round; an unfinished earlier round is lost.

        lost: as in the seam. Keys that came with the round before are there whoever is lost at "keys" now.
        Raises: SpecError; TooFewSurvivorsError when too few advertise or share.
        """
        losses = Losses(lost, self.spec.parties)
        self._policy.signatures.forget()
        return MaskedRound(self, losses)

    def _open(self, identities: Mapping[str, bytes], signatures: Signatures) -> ServerSession:
        opening = Opening(self._setup, self._policy.directory, signatures, wraps_at=self.spec.wraps_at)
        joining = {}
        for party, identity in identities.items():
            self.traffic.down(party, opening.invitation)
            joining[party], hello = join(
                opening.invitation, name=party, identity=identity, policy=self._policy, randomness=secrets.token_bytes
            )
            opening.receive(party, self.traffic.up(party, hello))
        gathering, hellos = opening.close()
        revealing = {}
        for party, raw in self.traffic.all_down(hellos).items():
            revealing[party], reveal = joining[party].reveal(raw)
            gathering.receive(party, self.traffic.up(party, reveal))
        session, reveals = gathering.close()
        for party, raw in self.traffic.all_down(reveals).items():
            self.members[party] = revealing[party].enter(raw)
        return session

    def advertise(self, party: str, number: int) -> bytes:
        """The party's keys for round ``number``; its state waits in ``early`` until that round begins."""
        if party not in self.early or self.early[party][0] != number:
            member, advertised, raw = self.members[party].advertise(number, randomness=secrets.token_bytes)
            self.members[party], self.early[party] = member, (number, advertised, raw)
        return self.early[party][2]


class MaskedRound:
    """See :class:`choral.protocols.interface.SumRound`. The server holds one vector, whatever the number of parties."""

    def __init__(self, session: MaskedSession, losses: Losses) -> None:
        self._session, self._losses = session, losses
        self._traffic = traffic = session.traffic
        session.number += 1
        self.number = session.number
        advertising = session.server.begin(self.number, session.following)
        for party in (party for party in advertising.waiting if losses.takes(party, "keys")):
            advertising.receive(party, traffic.up(party, session.advertise(party, self.number)))
        advertised, session.early, session.following = session.early, {}, {}
        sharing, rosters = advertising.close()
        shared = {}
        for party, raw in self._reached(rosters, "shares"):
            shared[party], shares = advertised[party][1].share(raw, randomness=secrets.token_bytes)
            sharing.receive(party, traffic.up(party, shares))
        self._uploading: Uploading
        self._uploading, deliveries = sharing.close()
        self._ready = {party: shared[party].receive(raw) for party, raw in traffic.all_down(deliveries).items()}
        self._uploaded: dict[str, Uploaded] = {}
        self._finished = False

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Mask the vector and add it to the server's sum.

        Raises: SpecError for an unknown party; StateUsedError the second time, or when a later round has begun;
        InputError for another vector than agreed on, after which the party may submit a right one.
        """
        self.check(party)
        self._uploaded[party], upload = self._ready[party].upload(vector)
        self._uploading.receive(party, self._traffic.up(party, upload))

    def check(self, party: str) -> None:
        """Raises: SpecError, StateUsedError: what ``submit`` would raise whatever the vector."""
        self._check_current()
        check_submission(party, self._session.spec, self._uploaded, self._losses, finished=self._finished)

    def finish(self) -> SumResult:
        """Recover from the dropouts and unmask.

        Raises: TooFewSurvivorsError, naming the counts and the missing; StateUsedError the second time.
        """
        self._check_current()
        if self._finished:
            raise StateUsedError("this round is finished")
        self._finished = True
        session, traffic = self._session, self._traffic
        confirming, survivors = self._uploading.close()
        confirmed = {}
        for party, raw in self._reached(survivors, "confirmation"):
            confirmed[party], confirm = self._uploaded[party].confirm(raw)
            confirming.receive(party, traffic.up(party, confirm))
        unmasking, confirmations = confirming.close()
        for party, raw in self._reached(confirmations, "unmasking"):
            following = session.advertise(party, self.number + 1)
            unmasking.receive(party, traffic.up(party, confirmed[party].unmask(raw, following=following)))
        outcome = unmasking.close()
        session.following = outcome.following
        up, down = traffic.take(session.spec.parties)
        return SumResult(total=outcome.total, survivors=outcome.survivors, bytes_up=up, bytes_down=down)

    def _reached(self, outbox: Mapping[str, bytes], step: Step) -> list[tuple[str, bytes]]:
        """The messages that find their party still there to take the step that they ask for."""
        there = {party: raw for party, raw in outbox.items() if self._losses.takes(party, step)}
        return list(self._traffic.all_down(there).items())

    def _check_current(self) -> None:
        if self.number != self._session.number:
            raise StateUsedError(f"round {self.number} ended when round {self._session.number} began")


class ByteCounter:
    """Bytes on the wire per party, counted as messages pass; those that opened the session are in the first round.

    Every message is shown to whoever watches (:mod:`choral.protocols.tap`).
    """

    def __init__(self) -> None:
        self._up: Counter[str] = Counter()
        self._down: Counter[str] = Counter()

    def up(self, party: str, raw: bytes) -> bytes:
        self._up[party] += len(raw)
        show("up", party, raw)
        return raw

    def down(self, party: str, raw: bytes) -> None:
        self._down[party] += len(raw)
        show("down", party, raw)

    def all_down(self, outbox: Mapping[str, bytes]) -> Mapping[str, bytes]:
        for party, raw in outbox.items():
            self.down(party, raw)
        return outbox

    def take(self, parties: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
        """What was counted since the last call, up and down."""
        up, down = ({party: count[party] for party in parties} for count in (self._up, self._down))
        self._up.clear()
        self._down.clear()
        return up, down
