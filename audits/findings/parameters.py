"""What standards ask for beside epsilon and delta, as data: other definitions' parameters, and lattice estimates."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class AtDelta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """epsilon: what the same ledger costs at this delta."""

    delta: float
    epsilon: float


class Renyi(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An upper bound on the Renyi divergence of this order between neighbours, over all of the ledger."""

    order: float
    divergence: float


class PersonPair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for all records of a person who has up to `records`. A delta of 1 promises nothing."""

    records: int
    epsilon: float
    delta: float


class PromiseParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data owner's ledger, of the owner with the largest epsilon, in the parameters that standards ask for.

    at: epsilon at delta 1e-5, 1e-6 and 1/n^2 for n records (or clients). mu: the least of Gaussian DP. rho: the least
    of zero-concentrated DP. Neither can tell that batches were drawn at random: both are those of the same noise on all
    records in each step, and where the sample rate is below 1 the epsilon that follows from them is far above ``at``,
    which counts the drawing in, as ``renyi`` does. None where the noise is not Gaussian (integer noise in shares for
    clients; a private search). For noise in shares of records they hold but for the failures of secure sums, which
    delta pays for. person: the pair for a whole person, where it was said how many records one has at most.
    """

    holder: str
    neighbours: str
    at: tuple[AtDelta, ...]
    rho: float | None = None
    mu: float | None = None
    renyi: tuple[Renyi, ...] = ()
    person: PersonPair | None = None


class LatticeEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it takes to break the ring-LWE of a homomorphic sum, by published estimates; none is of our own.

    modulus_bits: log2 q of the run. estimated_at: the log2 q that the estimates are for: the largest that this ring may
        have, so that the run has these bits or more. classical, quantum: bits of the best attack in the model named;
        None where none was computed. core_svp: classical, one sieve alone: the most careful count.
    estimator, version: whose figures.
    """

    ring_degree: int
    modulus_bits: int
    estimated_at: int
    key_law: str
    classical: float
    classical_model: str
    core_svp: float | None = None
    quantum: float | None = None
    quantum_model: str
    estimator: str
    version: str


_SPLIT = {2048: (53, 134.1, 106.6, 93.8), 4096: (106, 131.5, 102.2, 90.0), 8192: (212, 130.8, 100.2, 88.2)}
_STANDARD = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
_STANDARD_QUANTUM = {1024: 25, 2048: 51, 4096: 101, 8192: 202, 16384: 411, 32768: 827}


def lattice_of(secure_sum: Mapping[str, object] | None) -> LatticeEstimate | None:
    """Those of a homomorphic sum's statement; None for other sums, and for rings of which nothing is published."""
    said = secure_sum or {}
    degree, bits = said.get("ring_degree"), said.get("coefficient_modulus_bits")
    if not (isinstance(degree, int) and isinstance(bits, int)):
        return None
    if said.get("key") == "split" and degree in _SPLIT and bits <= _SPLIT[degree][0]:
        limit, gates, careful, quantum = _SPLIT[degree]
        return LatticeEstimate(
            ring_degree=degree,
            modulus_bits=bits,
            estimated_at=limit,
            key_law="discrete Gaussian, width 3.2 once the sum of keys is known",
            classical=gates,
            classical_model="gates (MATZOV)",
            core_svp=careful,
            quantum=quantum,
            quantum_model="ChaLoy21",
            estimator="lattice-estimator",
            version="27a581b",
        )
    if said.get("key") == "shared" and bits <= _STANDARD.get(degree, 0):
        enough = bits <= _STANDARD_QUANTUM[degree]
        return LatticeEstimate(
            ring_degree=degree,
            modulus_bits=bits,
            estimated_at=_STANDARD[degree],
            key_law="ternary",
            classical=128.0,
            classical_model="at least; table 1",
            quantum=128.0 if enough else None,
            quantum_model=f"table 2: 128 bits up to log2 q = {_STANDARD_QUANTUM[degree]}, no figure above",
            estimator="Homomorphic Encryption Standard (Albrecht et al.)",
            version="2018-11",
        )
    return None
