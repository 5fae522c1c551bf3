"""What a party accepts, and what a setup must satisfy whoever asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from choral.protocols.errors import PolicyError, SpecError
from choral.protocols.messages import Setup
from choral.protocols.parameters import SECURITY_BITS, achieved, counted
from choral.protocols.transcript import Signatures


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One party's own terms. The server's word counts for none of them.

    directory: Ed25519 public keys by party name, pinned: obtained from elsewhere than this server, and no two alike.
    corrupt: how many parties may collude with the server, as this party sees it: a count (int, 0 for none) or a
        fraction of the roster (float in [0, 1), rounded up). It has no default, for the threshold, the smallest sum
        and the neighbours that are safe all follow from it: a setup that assumes fewer colluders is refused, and so is
        one whose threshold, smallest sum or graph does not withstand them (:func:`check_setup`).
    minimum_cohort: fewest vectors that a sum with this party's in it may have; at least 2. Beyond corrupt + 2, which
        is always demanded.
    minimum_threshold: fewest holders who together can reconstruct a secret of this party; at least 2. Beyond what
        ``corrupt`` demands.
    maximum_modulus_bits, maximum_bound, maximum_length: of the vector. The bound is of a party's whole value, weight
        included, so it caps the weights of a sum whose scale is known.
    security_bits: least statistical security of a sparse graph, computed again by this party; 1 to 128. A complete
        graph meets any.
    wraps_at: the modulus bits at which the sum may wrap, as this party agreed to beforehand; None, it may not.
    encoding: the text that the setup must have for how values became integers; None takes any.
    server: "malicious" refuses a setup that protects against a semi-honest server only.

    Raises: SpecError for values outside these ranges, or two parties with one key (a Sybil of whoever holds it).
    """

    directory: Mapping[str, bytes]
    corrupt: int | float
    minimum_cohort: int = 2
    minimum_threshold: int = 2
    maximum_modulus_bits: int = 64
    maximum_bound: int = 2**62
    maximum_length: int = 2**31
    wraps_at: int | None = None
    server: Literal["semi-honest", "malicious"] = "malicious"
    security_bits: int = SECURITY_BITS
    encoding: str | None = None
    signatures: Signatures = field(default_factory=Signatures, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.minimum_cohort < 2 or self.minimum_threshold < 2:
            raise SpecError("expected a minimum cohort and threshold of at least 2: one party's sum is its own value")
        whole, fraction = isinstance(self.corrupt, int) and self.corrupt >= 0, isinstance(self.corrupt, float)
        if isinstance(self.corrupt, bool) or not (whole or (fraction and 0 <= self.corrupt < 1)):
            raise SpecError(f"expected corrupt as a count (int) or a fraction in [0, 1) (float), got {self.corrupt!r}")
        if not 1 <= self.security_bits <= 128:
            raise SpecError(f"expected 1 to 128 security bits, got {self.security_bits}")
        if any(len(key) != 32 for key in self.directory.values()):
            raise SpecError("expected Ed25519 public keys of 32 bytes")
        if len(set(self.directory.values())) != len(self.directory):
            raise SpecError("two parties of the directory have the same key: they are one")

    def check(self, setup: Setup, name: str) -> None:
        """Raises: PolicyError when ``setup`` is inconsistent, or weaker than this policy allows ``name`` to join."""
        check_setup(setup, wraps_at=self.wraps_at)
        strangers = [party for party in setup.roster if party not in self.directory]
        if strangers:
            raise PolicyError(f"the roster has {strangers[0]!r}, whose key is not pinned")
        if name not in setup.roster:
            raise PolicyError(f"the roster does not have {name!r}, the party that was asked to join")
        _at_least("smallest sum", setup.min_survivors, self.minimum_cohort)
        _at_least("threshold", setup.threshold, self.minimum_threshold)
        _at_least("number of corrupt parties", setup.corrupt, counted(self.corrupt, len(setup.roster)))
        _at_most("modulus bits", setup.modulus_bits, self.maximum_modulus_bits)
        _at_most("bound", setup.bound, self.maximum_bound)
        _at_most("length", setup.length, self.maximum_length)
        if not setup.complete:
            _at_least("statistical security in bits", setup.security_bits, self.security_bits)
        if self.encoding is not None and setup.encoding != self.encoding:
            raise PolicyError("the setup has another encoding of values to integers than this party uses")
        if self.server == "malicious" and setup.server != "malicious":
            raise PolicyError(
                "the setup protects against a semi-honest server only; this party expects a malicious one"
            )


def check_setup(setup: Setup, *, wraps_at: int | None = None) -> None:
    """What holds for any safe setup. wraps_at: as in :class:`Policy`. Raises: PolicyError.

    Thresholds, on a complete graph where all n parties hold shares: corrupt < t, and against a malicious server
    2t > n + corrupt (Bonawitz et al. 2017, 6.2). By it no two sets of survivors can both be confirmed, and no honest
    vector can be confirmed as a survivor after being masked with colluders and dropped parties only. On a sparse graph
    it is 2t > k + the colluders among one party's k neighbours, which must hold for all parties but with probability
    2^-security_bits over the graph (Bell et al. 2020, 3.4), and so that the graph is not cut in two
    (:mod:`choral.protocols.parameters`, which chooses k and t so). ``security_bits`` and ``correctness_bits`` are
    claims of whoever made the setup: they are computed again here.
    """
    n, k, t = len(setup.roster), setup.neighbours, setup.threshold
    if len(set(setup.roster)) != n:
        raise PolicyError("the roster has a name twice")
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


def _check_sparse(setup: Setup) -> None:
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
