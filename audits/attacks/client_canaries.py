"""Audit a federation by canary clients: trained once with them, and the claim held against the final model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from choral.audits.attacks.canaries import VISIBLE, directions, flip_coins, with_canary_clients
from choral.audits.attacks.score_audit import audit_scores, audit_training
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.audits.findings.evidence import Probe, ScoreAudit
    from choral.audits.lower_bounds.guessing import Guessing
    from choral.audits.probes.clients import Make
    from choral.privacy import ClientPrivacy
    from choral.trainers.run_folder.run import Run
    from choral.trainers.task.arithmetic import Compute
    from choral.trainers.task.task import Task

ATTACK = "canary clients in gradient space, against the final model"


def audit_clients(
    task: Task,
    parties: Mapping[str, Any],
    *,
    rounds: int,
    privacy: ClientPrivacy,
    canaries: int,
    compute: Compute | None = None,
    confidence: float = 0.95,
    guessing: Guessing | None = None,
    **federation: Any,
) -> tuple[Run, ScoreAudit]:
    """Run ``federate`` with canary clients beside the real ones, and hold its claim against the final model.

    The promise of ``privacy`` is for all clients together, canaries included: it is the run that is audited, and its
    model is a little worse for them. Half of the canaries' updates are not zero, each ten clipping norms long.
    Adversary: knows the initial and the final model. federation: further arguments of ``federate``.

    Raises: TooFewCanariesError before any training; what ``federate`` and ``audit_scores`` raise.
    """
    from choral.trainers import Compute, federate

    compute = Compute() if compute is None else compute
    marks = ClientMarks(task, parties, privacy, canaries, compute.seed)
    runs: list[Run] = []

    def train(chosen: list[Any]) -> Run:
        watched = marks.task(np.isin(np.arange(canaries), chosen))
        runs.append(federate(watched, rounds=rounds, privacy=privacy, compute=compute, **federation))
        return runs[0]

    found = audit_training(
        train, lambda run, _: marks.scores(run), range(canaries), delta=privacy.delta, claimed=privacy.epsilon,
        confidence=confidence, unit="client", guessing=guessing, attack=ATTACK,
    )  # fmt: skip
    return runs[0], found


def attack_clients(
    task: Task, privacy: ClientPrivacy, canaries: int, seed: int, train: Callable[[Task], Run]
) -> ScoreAudit:
    """The same for a federation that is trained by `train`, of the task that it is given: whether or not so many
    canaries could refute its claim, which the result says."""
    marks, inside = ClientMarks(task, task.parties, privacy, canaries, seed), flip_coins(canaries)
    run = train(marks.task(inside))
    claimed = run.spent.epsilon if run.spent else privacy.epsilon
    return audit_scores(
        marks.scores(run), inside, design="coins", delta=privacy.delta, claimed=claimed, unit="client", attack=ATTACK
    )


class ClientMarks:
    """Secret directions for canary clients, the task with such clients, and how far a final model went along each."""

    def __init__(
        self, task: Task, parties: Mapping[str, Any], privacy: ClientPrivacy, canaries: int, seed: int
    ) -> None:
        from choral.privacy import AdaptiveClip
        from choral.trainers.local_steps.resident_model import initial_model
        from choral.trainers.task.flat_vector import Layout
        from choral.trainers.task.initial_weights import Weights

        self._task, self._parties = task, parties
        initial = Weights.read(task.initial_weights) if task.initial_weights is not None else None
        self._model = initial_model(task.build, next(iter(parties.values())), seed, initial)
        self._layout = Layout(self._model)
        self._before = self._layout.read()
        clip = privacy.clip.start if isinstance(privacy.clip, AdaptiveClip) else privacy.clip
        self._directions, self._length = directions(canaries, self._layout.length), VISIBLE * float(clip)

    def task(self, inside: npt.NDArray[np.bool_]) -> Task:
        """With one client more for each coin: its direction, or zero. Nobody holds records of canaries out."""
        task = self._task
        job = with_canary_clients(task.build, task.fit, self._parties, self._length * self._directions, inside)
        return replace(
            task, build=job["build"], fit=job["fit"], parties=job["parties"], engine=None, held_out=None,
            evaluate_party=None,
        )  # fmt: skip

    def scores(self, run: Run) -> npt.NDArray[np.float64]:
        self._model.load_state_dict(dict(run.state))
        change = self._layout.read() - self._before
        return np.asarray((self._directions.double() @ change.cpu().double()).numpy())


def _some_of_each(count: int) -> npt.NDArray[np.bool_]:
    """Fair coins, all of them tossed again while they are alike: of ten, once in 512 times.

    Whatever had probability p has p / (1 - 2^(1 - count)) then at most.
    """
    coins = flip_coins(count)
    while coins.all() or not coins.any():
        coins = flip_coins(count)
    return coins


def probe_clients(
    privacy: ClientPrivacy,
    *,
    clients: int | None = None,
    rounds: int = 24,
    length: int = 1500,
    make: Make | None = None,
    confidence: float = 0.95,
) -> Probe:
    """Run the sums of `clients` clients twice on updates made for it, and test what is opened against the ledger.

    clients: None makes 60 where the server adds the noise, which is then no larger for more of them, and clipping shows
        better; and 20 else, where one that adds no share of the noise shows better among few.
    make: from promise, clients, length, rounds and ledger to the engine; by default :class:`ClientPrivacyEngine`.
    Finds: noise of the honest clients that is smaller than the ledger says, anywhere or at any time, not Gaussian, used
        twice, elsewhere, or made of what anybody can know; updates beyond the clipping norm; sums that nobody paid for.
    Does not find: what `Probe.sentence` says at its end. The bound by canaries, of as many as there are honest clients,
        is far below most promises, and finds gross faults alone. An adaptive clip is held still.
    Raises: ConfigError (too few clients; an update too short for them); what the engine raises.
    """
    from choral.audits.findings.evidence import Probe
    from choral.audits.probes.clients import UNSEEN, client_checks, opened_sums, own_engine
    from choral.audits.probes.twins import one_after_another

    clients = (60 if privacy.noise == "central" else 20) if clients is None else clients
    if clients < 12 or length < 4 * clients or rounds < 4:
        raise ConfigError(
            f"{clients} clients, {rounds} rounds and {length} coordinates, expected >= 12, >= 4 and >= 4 per client"
        )
    seen = one_after_another(lambda: opened_sums(privacy, clients, rounds, length, make or own_engine, _some_of_each))
    checks, first = client_checks(seen), seen[0]
    certain = 1.0 - (1.0 - confidence) * (1.0 - 2.0 ** (1 - len(first.inside)))
    audit = audit_scores(
        (first.released[:, : len(first.inside)] * first.there).sum(axis=0), first.inside, design="coins",
        delta=privacy.delta, claimed=first.spent.epsilon, confidence=certain, unit="client",
        attack="updates of probe clients in every sum",
    )  # fmt: skip
    audit = msgspec.structs.replace(  # it was held to `certain`, and of what it says so much is left
        audit,
        bounds=tuple(msgspec.structs.replace(bound, confidence=confidence) for bound in audit.bounds),
        sentence=audit.sentence.replace(f"{100 * certain:.4g}", f"{100 * confidence:.4g}"),
    )
    faults = [each.finding for each in checks if each.violated]
    faults += [audit.sentence] if audit.finding == "violated" else []
    said = f"No fault found in {2 * rounds} sums of probe clients. {audit.sentence} {UNSEEN}"
    return Probe(checks=checks, canaries=audit, violated=bool(faults), sentence=" ".join(faults) or said)
