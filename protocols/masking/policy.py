"""What a party brings along and accepts, and what a setup must satisfy whoever asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import Randomness, Store
from choral.protocols.errors import PolicyError, SpecError
from choral.protocols.masking.messages import MAX_PARTIES, SumSetup
from choral.protocols.masking.parameters import SECURITY_BITS, SERVERS, achieved, colluding
from choral.protocols.masking.signing import Signatures

DRAWS = ("chosen", "random")
"""What a party may take for granted of a roster that is not the whole directory."""
COHORT_TRUST = {
    "everyone": "",
    "chosen": " The server chose this roster out of all parties, and so may have put every one that colludes into it.",
    "random": (
        " The server is taken to be semi-honest in the choice of the cohort: that it drew the roster at random is taken"
        " on its word, and one that picks colluders by hand reads single vectors."
    ),
}
"""What is said of each way to make a roster."""
MOST_PINNED = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One party's own terms. The server's word counts for none of them.

    directory: Ed25519 public keys by party name, pinned: obtained from elsewhere than this server, and no two alike.
        Empty, every roster is refused; a rehearsal in one process fills it in.
    directory_size: how many parties are pinned, where ``directory`` holds only some of their keys; by default as many
        as it holds. Every party of a sum must say the same.
    corrupt: how many parties of the directory may collude with the server, as this party sees it: a count (int, 0 for
        none) or a fraction of the directory (float in [0, 1), rounded up), **never of the roster**, into which the
        server may put all of them. It has no default, for the threshold, the smallest sum and the neighbours that are
        safe all follow from it: a setup that assumes fewer colluders is refused, and so is one whose threshold,
        smallest sum or graph does not withstand them (:func:`check_setup`).
    cohort: "chosen" takes a roster that is not the whole directory for one that the server picked as it liked, so that
        all colluders may be in it. "random" takes the server's word that it drew the roster at random, and so a
        fraction for what a draw has (:func:`~choral.protocols.masking.parameters.colluding`): *semi-honest in the
        choice of the cohort*, whatever else ``server`` says.
    minimum_cohort: fewest vectors that a sum with this party's in it may have; at least 2. Beyond corrupt + 2, which
        is always demanded.
    minimum_threshold: fewest holders who together can reconstruct a secret of this party; at least 2. Beyond what
        ``corrupt`` demands.
    maximum_modulus_bits, maximum_bound, maximum_length: of the vector. The bound is of a party's whole value, weight
        included, so it caps the weights of a sum whose scale is known.
    maximum_weight: of the last coordinate, where that is a party's weight; of a setup that has no bound of its own for
        it, the bound of all. None takes any.
    terms: the digest of the training terms that the setup must be signed with; None takes a setup without.
    security_bits: least statistical security of a sparse graph, computed again by this party; 1 to 128. A complete
        graph meets any.
    wraps_at: the modulus bits at which the sum may wrap, as this party agreed to beforehand; None, it may not.
    encoding: the text that the setup must have for how values became integers, letter by letter.
    server: "malicious" refuses a setup that protects against a semi-honest server only.

    Raises: SpecError for values of another type or outside these ranges, two parties with one key (a Sybil of whoever
    holds it), or two spellings of one name.
    """

    corrupt: int | float
    directory: Mapping[str, bytes] = field(default_factory=dict)
    directory_size: int | None = None
    cohort: Literal["chosen", "random"] = "chosen"
    minimum_cohort: int = 2
    minimum_threshold: int = 2
    maximum_modulus_bits: int = 64
    maximum_bound: int = 2**62
    maximum_length: int = 2**31
    wraps_at: int | None = None
    server: Literal["semi-honest", "malicious"] = "malicious"
    security_bits: int = SECURITY_BITS
    encoding: str = ""
    maximum_weight: int | None = None
    terms: bytes | None = None
    signatures: Signatures = field(default_factory=Signatures, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks.directory(self.directory)
        checks.one_of(self.cohort, "cohort", DRAWS)
        checks.one_of(self.server, "server", SERVERS)
        checks.text(self.encoding, "the encoding")
        checks.digest(self.terms, "the terms")
        if not isinstance(self.signatures, Signatures):
            raise SpecError(f"expected signatures as Signatures(), got {checks.shown(self.signatures)}")
        plain = {
            "corrupt": checks.share(self.corrupt, "corrupt"),
            "directory_size": checks.optional(
                self.directory_size, "directory_size", max(2, len(self.directory)), MOST_PINNED
            ),
            "minimum_cohort": checks.whole(self.minimum_cohort, "minimum_cohort", 2, MAX_PARTIES),
            "minimum_threshold": checks.whole(self.minimum_threshold, "minimum_threshold", 2, MAX_PARTIES),
            "maximum_modulus_bits": checks.whole(self.maximum_modulus_bits, "maximum_modulus_bits", 1, 64),
            "maximum_bound": checks.whole(self.maximum_bound, "maximum_bound", 1, 2**62),
            "maximum_length": checks.whole(self.maximum_length, "maximum_length", 1, 2**31),
            "maximum_weight": checks.optional(self.maximum_weight, "maximum_weight", 1, 2**62),
            "wraps_at": checks.optional(self.wraps_at, "wraps_at", 1, 64),
            "security_bits": checks.whole(self.security_bits, "security_bits", 1, 128),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def pinned(self) -> int:
        """How many parties there are, of whom ``corrupt`` may collude."""
        return len(self.directory) if self.directory_size is None else self.directory_size

    def check(self, setup: SumSetup, name: str) -> None:
        """Raises: PolicyError when ``setup`` is inconsistent, or weaker than this policy allows ``name`` to join."""
        self.signatures.once(("safe", setup, self.wraps_at), lambda: check_setup(setup, wraps_at=self.wraps_at))
        strangers = [party for party in setup.roster if party not in self.directory]
        if strangers:
            raise PolicyError(f"the roster has {strangers[0]!r}, whose key is not pinned")
        if name not in setup.roster:
            raise PolicyError(f"the roster does not have {name!r}, the party that was asked to join")
        if setup.population != self.pinned:
            raise PolicyError(
                f"the roster is said to be out of {setup.population} parties, and this party has pinned {self.pinned}"
            )
        if setup.cohort == "random" and self.cohort != "random":
            raise PolicyError(
                "the setup takes the server for semi-honest in the choice of the cohort; this party expects one that"
                " puts whom it likes into the roster"
            )
        _at_least("smallest sum", setup.min_survivors, self.minimum_cohort)
        _at_least("threshold", setup.threshold, self.minimum_threshold)
        colluders = colluding(self.corrupt, self.pinned, len(setup.roster), setup.cohort)
        _at_least("number of corrupt parties", setup.corrupt, colluders)
        self.check_vector(setup.length, setup.bound, setup.modulus_bits, setup.encoding, setup.weight_bound)
        if setup.terms != self.terms:
            raise PolicyError("the setup is for other training terms than this party was told of")
        if not setup.complete:
            _at_least("statistical security in bits", setup.security_bits, self.security_bits)
        if self.server == "malicious" and setup.server != "malicious":
            raise PolicyError(
                "the setup protects against a semi-honest server only; this party expects a malicious one"
            )

    def check_vector(
        self, length: int, bound: int, modulus_bits: int, encoding: str, weight_bound: int | None = None
    ) -> None:
        """What this policy says of the vector itself. Raises: PolicyError."""
        _at_most("modulus bits", modulus_bits, self.maximum_modulus_bits)
        _at_most("bound", bound, self.maximum_bound)
        _at_most("length", length, self.maximum_length)
        if encoding != self.encoding:
            raise PolicyError("the setup has another encoding of values to integers than this party uses")
        if self.maximum_weight is not None:
            _at_most("weight", bound if weight_bound is None else weight_bound, self.maximum_weight)


def check_policy(policy: object) -> Policy:
    """Raises: SpecError for anything else than a policy."""
    if not isinstance(policy, Policy):
        raise SpecError(f"expected a Policy, got {checks.shown(policy)}", hint="Policy(corrupt=..., ...)")
    return policy


def check_setup(setup: SumSetup, *, wraps_at: int | None = None) -> None:
    """What holds for any safe setup. wraps_at: as in :class:`Policy`. Raises: PolicyError.

    Thresholds, on a complete graph where all n parties hold shares: corrupt < t, and against a malicious server
    2t > n + corrupt (Bonawitz et al. 2017, 6.2). By it no two sets of survivors can both be confirmed, and no honest
    vector can be confirmed as a survivor after being masked with colluders and dropped parties only. On a sparse graph
    it is 2t > k + the colluders among one party's k neighbours, which must hold for all parties but with probability
    2^-security_bits over the graph (Bell et al. 2020, 3.4), and so that the graph is not cut in two
    (:mod:`choral.protocols.masking.parameters`, which chooses k and t so). ``security_bits`` and ``correctness_bits``
    are claims of whoever made the setup: they are computed again here.
    """
    n, k, t = len(setup.roster), setup.neighbours, setup.threshold
    check_roster(setup.roster)
    if setup.population < n or (setup.directory is None) != (setup.cohort == "everyone"):
        raise PolicyError(f"a roster of {n} parties out of {setup.population} is not {setup.cohort!r}")
    if k > n - 1 or (k < n - 1 and (k < 2 or (k % 2 and n % 2))):
        raise PolicyError(f"no graph has {n} parties with {k} neighbours each")
    if t > setup.holders:
        raise PolicyError(f"a threshold of {t} among {setup.holders} holders can never be met")
    if setup.min_survivors < max(t, setup.corrupt + 2):
        raise PolicyError(
            f"a sum of {setup.min_survivors} may be over fewer than the threshold, or over one honest vector and"
            f" {setup.corrupt} corrupt ones"
        )
    if setup.min_survivors > n:
        raise PolicyError(f"a sum of {setup.min_survivors} out of {n} parties can never be made")
    if setup.weight_bound is not None and setup.weight_bound > setup.bound:
        raise PolicyError(f"weights up to {setup.weight_bound} pass the bound of {setup.bound} for any coordinate")
    if setup.dropouts >= n:
        raise PolicyError("the setup assumes that nobody is left")
    if setup.modulus_bits != wraps_at and setup.modulus_bits < (2 * n * setup.bound).bit_length():
        raise PolicyError(f"{n} values up to {setup.bound} can wrap in {setup.modulus_bits} bits")
    if setup.complete and t <= setup.corrupt:
        raise PolicyError(f"a threshold of {t} is met by the {setup.corrupt} parties that may be corrupt")
    malicious = setup.server == "malicious"
    corrupt = setup.corrupt if setup.complete else 0
    if malicious and not 2 * t > setup.holders + corrupt:
        raise PolicyError(f"a malicious server asks for 2t > {setup.holders} + {corrupt}, got t = {t}")
    if not setup.complete:
        _check_sparse(setup)


def check_roster(roster: Sequence[str]) -> None:
    """Raises: PolicyError for a name that is there twice, in whatever spelling."""
    if len(set(roster)) != len(roster):
        raise PolicyError("the roster has a name twice")
    try:
        checks.names(roster, "the roster")
    except SpecError as error:
        raise PolicyError(str(error)) from None


def _check_sparse(setup: SumSetup) -> None:
    """Compute again what the graph achieves. Raises: PolicyError where that is less than the setup claims."""
    security, correctness = achieved(
        len(setup.roster),
        setup.neighbours,
        setup.threshold,
        corrupt=setup.corrupt,
        dropouts=setup.dropouts,
        server=setup.server,
    )
    chosen = f"{setup.neighbours} neighbours with a threshold of {setup.threshold}"
    if security < setup.security_bits:
        raise PolicyError(
            f"of {len(setup.roster)} parties {setup.corrupt} are too many for {chosen}: they would surround some party,"
            f" or cut the graph, with probability 2^-{security:.1f}, not 2^-{setup.security_bits}"
        )
    if correctness < setup.correctness_bits:
        raise PolicyError(
            f"{setup.dropouts} dropouts are too many for {chosen}: a round would fail with probability"
            f" 2^-{correctness:.1f}, not 2^-{setup.correctness_bits}"
        )


def _at_least(what: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise PolicyError(f"this party accepts a {what} of at least {minimum}, the setup says {value}")


def _at_most(what: str, value: int, maximum: int) -> None:
    if value > maximum:
        raise PolicyError(f"this party accepts {what} of at most {maximum}, the setup says {value}")


@dataclass(frozen=True, kw_only=True, repr=False)
class PartyContext:
    """What a party brings along, whichever sum it takes part in.

    name, policy: whose directory pins ``identity``'s public key under that name. store: is given the public state
    whenever it changes, ahead of what depends on it. state: such a state, of before a restart. purpose: tells this
    identity's sums apart (:meth:`Identity.sessions`). repeats: whether the transport may ask twice.

    Raises: SpecError for an identity that is not pinned, and for anything else than an identity and a policy.
    """

    name: str
    identity: Identity
    policy: Policy
    randomness: Randomness
    store: Store | None = None
    state: bytes | None = None
    purpose: str = ""
    repeats: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.identity, Identity):
            raise SpecError(f"expected an Identity, got a {type(self.identity).__name__}", hint="Identity(seed)")
        if check_policy(self.policy).directory.get(self.name) != self.identity.public:
            raise SpecError(f"the identity of {self.name!r} is not the one in its own directory")
