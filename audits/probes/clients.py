"""Probe noise for whole clients: do the sums that are opened hold what the ledger says, and each client once, clipped?

Clients send updates made for it: each has a coordinate of its own, 3, 50 or 1000 clipping norms long, or nothing, by a
coin; all other coordinates hold noise alone. The adversary is as strong as the promise supposes: of distributed noise
it opens a sum of as few clients as may be, and takes off what the colluders sent; of local noise it looks at one
client's message; of central noise at what the server publishes. It is done twice from one public state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from choral.audits.findings.evidence import ProbeCheck
from choral.audits.probes import noise_checks
from choral.audits.probes.noise_checks import noise_reuse
from choral.audits.probes.records import LOUDNESS, Floats
from choral.audits.probes.seen import check, paid_for, windows
from choral.privacy import AdaptiveClip, ClientPrivacy, ClientPrivacyEngine, Ledger, Spent

Make = Callable[[ClientPrivacy, int, int, int, Ledger], ClientPrivacyEngine]
Flip = Callable[[int], npt.NDArray[np.bool_]]
UNSEEN = (
    "Who is selected, what a client does before it sends its update, and what the secure sum shows beside the sum are"
    " not seen; nor noise that is merely larger than claimed."
)


@dataclasses.dataclass(frozen=True)
class SeenSums:
    """released: sums in clipping norms, shape (rounds, length). there: whose update is in which, (rounds, clients)."""

    released: Floats
    there: npt.NDArray[np.bool_]
    inside: npt.NDArray[np.bool_]
    spent: Spent
    step: float

    @property
    def quiet(self) -> Floats:
        return self.released[:, self.there.shape[1] :]


def client_checks(seen: list[SeenSums]) -> tuple[ProbeCheck, ...]:
    first, quiet = seen[0], [each.quiet for each in seen]
    together = np.concatenate(quiet)
    noise = max(first.spent.noise_multiplier, math.sqrt(float((together**2).mean())))
    return (
        noise_checks.noise_size(quiet, first.spent.noise_multiplier),
        noise_checks.noise_law(together, first.step),
        noise_reuse(together),
        noise_checks.noise_moved(quiet),
        _clipped(seen, noise),
        paid_for(len(first.released), first.spent.steps, "sum"),
    )


def own_engine(privacy: ClientPrivacy, clients: int, length: int, rounds: int, ledger: Ledger) -> ClientPrivacyEngine:
    return ClientPrivacyEngine(privacy, clients=clients, length=length, rounds=rounds, ledger=ledger)


def opened_sums(privacy: ClientPrivacy, clients: int, rounds: int, length: int, make: Make, flip: Flip) -> SeenSums:
    """One federation on fresh coins."""
    kept, clip = 1.0, privacy.clip
    if isinstance(clip, AdaptiveClip):
        kept, privacy = math.sqrt(1.0 - clip.share), dataclasses.replace(
            privacy, clip=dataclasses.replace(clip, rate=1e-12)
        )  # fmt: skip
    ledger = Ledger()
    engine = make(dataclasses.replace(privacy, ledger=None), clients, length, rounds, ledger)
    survivors = engine.min_survivors if privacy.noise == "distributed" else 1 if privacy.noise == "local" else clients
    honest = survivors - privacy.colluders if privacy.noise == "distributed" else clients
    inside = flip(honest)
    updates = np.zeros((honest, length))
    updates[np.arange(honest), np.arange(honest)] = np.resize(LOUDNESS, honest) * inside * engine.clip
    released, there = np.zeros((rounds, length)), np.zeros((rounds, honest), dtype=np.bool_)
    for number in range(rounds):
        current = engine.begin()
        there[number] = True if privacy.noise != "local" else np.arange(honest) == number % honest
        sent = [current.encode(updates[client]) for client in np.flatnonzero(there[number])]
        opened = current.decode(np.sum(sent, axis=0), survivors).double().numpy()
        released[number] = opened * (engine.divisor(survivors) * kept / current.clip)
    step = float(getattr(engine.scheme, "grid", 0.0))  # a rotated sum is on no grid
    return SeenSums(released, there, inside, engine.spent(), step)


def _clipped(seen: list[SeenSums], noise: float) -> ProbeCheck:
    """What a client that sends something adds is at most 1; and nothing if it sends nothing. Bonferroni over the tests:
    alone, on average, in parts of the schedule, and by how long the update was."""
    parts = np.concatenate([each.released[:, : len(each.inside)] for each in seen])
    there = np.concatenate([each.there for each in seen])
    inside = np.concatenate([np.broadcast_to(each.inside, each.there.shape) for each in seen])
    sent = there & inside
    largest = float(np.abs(parts).max())
    tails = [2.0 * parts.size * float(ndtr(-(largest - 1.0) / noise))]
    lengths = [float(parts[sent].mean())]
    kinds = np.resize(np.arange(len(LOUDNESS)), parts.shape[1])
    chosen = [sent, *(sent & (kinds == kind) for kind in range(len(LOUDNESS)))]
    for _, rows in windows([each.released for each in seen]):
        some = np.zeros_like(sent)
        some[rows] = sent[rows]
        chosen.append(some)
    chosen = [each for each in chosen if each.any()]
    for each in chosen:
        lengths.append(float(parts[each].mean()))
        tails.append(len(chosen) * float(ndtr(-(lengths[-1] - 1.0) * math.sqrt(each.sum()) / noise)))
    others = parts[~sent]
    if others.size:
        tails.append(2.0 * float(ndtr(-abs(float(others.sum())) / (noise * math.sqrt(others.size)))))
    return check(
        "Every client is clipped",
        3.0 * min(tails),
        f"A client counts for {lengths[0]:.3g} clipping norms on average, and moves a sum by {largest:.4g} at most,"
        " noise included.",
        f"A client counts for up to {max(lengths):.4g} clipping norms where one is claimed, or moves sums that it is"
        " not in.",
        (1.0, lengths[0]),
        "Noise is Gaussian of the claimed size.",
    )
