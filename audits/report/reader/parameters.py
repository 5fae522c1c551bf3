"""A promise in the parameters of other definitions, and how hard a lattice is, as rows of words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.audits.findings.text import cost, power

if TYPE_CHECKING:
    from choral.audits.findings.parameters import LatticeEstimate, PromiseParameters


def parameter_rows(found: PromiseParameters) -> list[tuple[str, str]]:
    """(what, how much) of the ledger that cost the most."""
    rows = [(f"ε at δ = {power(each.delta)}", cost(each.epsilon)) for each in found.at]
    if found.rho is not None and found.mu is not None:
        rows += [
            ("ρ (zero-concentrated DP), not counting that batches are drawn", f"{found.rho:.4g}"),
            ("μ (Gaussian DP), not counting that batches are drawn", f"{found.mu:.4g}"),
        ]
    if found.renyi:
        curve = "; ".join(f"{each.order:g}: {each.divergence:.4g}" for each in found.renyi)
        rows.append(("Rényi DP, order: divergence", curve))
    if (person := found.person) is not None:
        pair = f"ε = {cost(person.epsilon)}, δ = {power(person.delta)}" if person.delta < 1.0 else "nothing is promised"
        rows.append((f"For a person with up to {person.records} records", pair))
    return rows


def lattice_words(found: LatticeEstimate) -> str:
    """The estimates in a sentence, with whose they are."""
    careful = "" if found.core_svp is None else f", {found.core_svp:g} by core-SVP, the most careful count"
    quantum = "no figure" if found.quantum is None else f"{found.quantum:g} bits"
    return (
        f"Ring-LWE of degree {found.ring_degree} and log2 q = {found.modulus_bits}: at least {found.classical:g} bits"
        f" against a classical computer ({found.classical_model}){careful}; {quantum} against a quantum computer"
        f" ({found.quantum_model}). Estimates for log2 q = {found.estimated_at}, by {found.estimator}, {found.version}."
    )
