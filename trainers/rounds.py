"""One round of any algorithm: its exchanges, each a secure sum over the parties that are still there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Privacy
from choral.protocols.seam import SecureSum, SumResult, SumSession
from choral.trainers.algorithms.seam import (
    Algorithm,
    Exchange,
    LocalTrainer,
    Mean,
    Party,
    Server,
    Setup,
    Work,
)
from choral.trainers.coders import Coder
from choral.trainers.local import seeded
from choral.trainers.memory import Memory, State
from choral.trainers.participation import fixed_cohort, stream
from choral.trainers.run import RunFolderError
from choral.trainers.task import DivergedError, Loss, TaskError
from choral.trainers.transcript import Transcript


@dataclass
class Traffic:
    """Of one round. survivors: of its last exchange. bytes_up, bytes_down: of each exchange's busiest party, summed."""

    survivors: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class Federation:
    """All that stays the same from round to round, and the memory, which does not."""

    algorithm: Algorithm
    trainer: LocalTrainer
    setup: Setup
    names: Sequence[str]
    examples: Mapping[str, int]
    coders: Mapping[str, Coder]
    sessions: Mapping[str, SumSession]
    memory: Memory
    dropout_rate: float
    cohort: int | None
    secure_sum: SecureSum
    seed: int
    seen: Transcript

    def round(self, weights: torch.Tensor, number: int) -> tuple[torch.Tensor, Traffic]:
        """The next weights, float32, shape (d,). The memory changes only if the round succeeds.

        Raises: DivergedError if they are not finite; RunFolderError if the last round's memory is missing; what
            trainer, coder and secure sum raise.
        """
        self.seen.round = number
        if number > 1 and self.algorithm.remembers and not self.memory:
            raise RunFolderError(
                f"what {self.algorithm.kind} kept after round {number - 1} is missing, without which it cannot go on",
                hint=f"restore memory.{number - 1}.safetensors, or run again in a new folder",
            )
        server = dict(self.memory.server)
        parties = {name: dict(state) for name, state in self.memory.parties.items()}
        traffic, present, sums = Traffic(), self._asked(number), 0
        rooms = (
            self.sessions
            if self.cohort is None
            else open_sessions(self.secure_sum, self.coders, self.seen, roster=present)
        )
        steps = self.algorithm.round(Server(setup=self.setup, number=number, state=server), weights)
        try:
            ask = next(steps)
            while True:
                present = self._present(present, number, sums)
                mean, present = self._exchange(ask, rooms, present, parties, number, traffic, first=sums == 0)
                sums += 1
                ask = steps.send(mean)
        except StopIteration as end:
            moved: torch.Tensor = end.value
        if not torch.isfinite(moved).all():
            raise DivergedError(
                f"the server's step diverged in round {number}: the weights are not finite",
                hint="lower the learning rates; the last good round is kept",
            )
        self.memory.server, self.memory.parties = server, parties
        return moved, traffic

    def _exchange(
        self,
        ask: Exchange,
        rooms: Mapping[str, SumSession],
        present: tuple[str, ...],
        states: dict[str, State],
        number: int,
        traffic: Traffic,
        *,
        first: bool,
    ) -> tuple[Mean, tuple[str, ...]]:
        """Keys among all who are asked, then each present party's vector, added as it comes, then the sum."""
        coder = self.coders[ask.channel]
        coder.begin(present)
        summing = rooms[ask.channel].begin()
        working: dict[str, Party] = {}

        def orders() -> Iterator[tuple[str, Work]]:
            for name in present:
                party = Party(
                    name=name,
                    examples=self.examples[name],
                    setup=self.setup,
                    number=number,
                    state=dict(states.get(name, {})),
                )
                working[name] = party
                yield name, self.algorithm.work(party, ask)

        kept: dict[str, State] = {}
        answered: set[str] = set()
        for name, done in self.trainer.do(orders(), ask.weights, number):
            party = working.pop(name)
            vector = coder.encode(name, self.algorithm.answer(party, ask, done))
            self.seen.vector(name, vector)
            summing.submit(name, vector)
            answered.add(name)
            if party.state or name in states:
                kept[name] = dict(party.state)
        if missing := [name for name in present if name not in answered]:
            raise TaskError(
                f"the engine {type(self.trainer).__name__} made nothing of the work of party {missing[0]!r}",
                hint="LocalTrainer.do yields one result per order",
            )
        result: SumResult = summing.finish()
        for name in result.survivors:
            if name in kept:
                states[name] = kept[name]
        sent = [*ask.new.values(), *([ask.weights] if first else [])]
        traffic.survivors = len(result.survivors)
        traffic.bytes_up += max(result.bytes_up.values())
        traffic.bytes_down += max(result.bytes_down.values()) + 4 * sum(tensor.numel() for tensor in sent)
        return coder.decode(result), result.survivors

    def _asked(self, number: int) -> tuple[str, ...]:
        """Everybody, or this round's cohort, each set of its size equally likely."""
        if self.cohort is None:
            return tuple(self.names)
        chosen = fixed_cohort(len(self.names), self.cohort, stream(self.seed, number, "cohort"))
        return tuple(self.names[index] for index in chosen.tolist())

    def _present(self, parties: tuple[str, ...], number: int, sums: int) -> tuple[str, ...]:
        """Who is left of `parties` for the next exchange: lost ones stay lost, each at some exchange of the round."""
        if not self.dropout_rate:
            return parties
        with seeded(self.seed, number, "dropouts"):
            asked = self._asked(number)
            luck = dict(zip(asked, torch.rand(len(asked)).tolist(), strict=True))
        channels = self.algorithm.channels(self.setup).values()
        part = min((sums + 1) / sum(not channel.once for channel in channels), 1.0)
        return tuple(party for party in parties if luck[party] >= self.dropout_rate * part)


def open_sessions(
    secure_sum: SecureSum, coders: Mapping[str, Coder], seen: Transcript, *, roster: tuple[str, ...] | None = None
) -> dict[str, SumSession]:
    """One session per channel; channels whose vectors look alike share one. roster: by default all parties. seen: is
    told of each.

    Raises: what the coders' check does; what the secure sum does for a roster of that size.
    """
    sessions: dict[str, SumSession] = {}
    by_spec: dict[object, SumSession] = {}
    for name, coder in coders.items():
        spec = coder.spec if roster is None else replace(coder.spec, parties=roster)
        if spec not in by_spec:
            seen.begin(secure_sum.name, spec)
            by_spec[spec] = secure_sum.open(spec)
        sessions[name] = by_spec[spec]
        coder.check(sessions[name])
    return sessions


def check_cohort(algorithm: Algorithm, cohort: int | None, parties: int) -> None:
    """Raises: ConfigError for a cohort that is no number from 2 to all, or whose algorithm needs everybody."""
    if cohort is None:
        return
    if not 2 <= cohort <= parties:
        raise ConfigError(f"expected a cohort of 2 to {parties} parties, got {cohort}", hint="None asks all")
    probe = Setup(parties=2, length=7, examples=2, largest=2, value_bound=1.0)
    if algorithm.keeps or any(channel.once for channel in algorithm.channels(probe).values()):
        raise ConfigError(
            f"{algorithm.kind} needs every party: its parties keep state, or are counted once for the whole run",
            hint="leave out cohort, or use FedAvg, FedProx, FedAdam, FedYogi or FedNova",
        )


def check_fits(algorithm: Algorithm, privacy: Privacy | ClientPrivacy | None, loss: Loss | None) -> None:
    """Whether the algorithm's releases are what the promise covers, and the task has what it needs.

    Raises: ConfigError naming the release that would not be charged; TaskError for a missing loss.
    """
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(f"algorithm is {algorithm!r}, expected one such as FedAvg()", hint="see docs/algorithms.md")
    if algorithm.needs_loss and loss is None:
        raise TaskError(
            f"{algorithm.kind} needs the gradients of the records, and the task has no loss",
            hint="give loss(model, batch) -> tensor of one loss per record, shape (n,)",
        )
    if isinstance(privacy, ClientPrivacy):
        _check_client(algorithm)
    elif privacy is not None:
        for release in algorithm.releases:
            if release.source == "data":
                raise ConfigError(
                    f"{algorithm.kind} also releases {release.what}, read from the records outside fit: record-level"
                    " privacy adds noise to the steps of fit only",
                    hint="use FedAvg, FedProx, SCAFFOLD, FedAdam, FedYogi or FedNova; or ClientPrivacy",
                )


def _check_client(algorithm: Algorithm) -> None:
    """Client-level privacy clips one vector of the model's length per sum, and knows no state beside it."""
    probe = Setup(parties=2, length=7, examples=2, largest=2, value_bound=1.0)
    for name, channel in algorithm.channels(probe).items():
        if channel.length != probe.length or channel.largest_count is not None:
            raise ConfigError(
                f"{algorithm.kind}: what its {name!r} exchange releases is not one vector like the weights, which"
                " client-level privacy could clip as a whole",
                hint=algorithm.client_hint,
            )
    if algorithm.keeps:
        raise ConfigError(
            f"{algorithm.kind}: its parties keep state that must agree with the sums, and clipping breaks that",
            hint=algorithm.client_hint,
        )
