"""One federation over several processes, GPUs or machines, as torchrun starts them.

    torchrun --nproc-per-node 2 train.py        # train.py calls federate as ever

Rank 0 is the federation: it plays the server and the secure sum, evaluates, and writes the run's folder. All ranks
train: rank 0 says who trains what, the others send back what was made of it, and `federate` returns the same run on all
of them. A party's training depends on (seed, round, party) alone, so where it happens changes nothing.

Parties go to the rank with the fewest examples so far. With record-level privacy a party stays at one rank, which
alone writes its ledger; rank 0 reads it. A rank that dies ends the run with :class:`ProcessError` on the others.

Between the processes go safetensors and JSON over gloo, never pickles: they are one user's processes that trust one
another, and what they send is **not** protected. This is for simulation; parties of different trust need a network.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from choral.errors import ChoralError
from choral.trainers.algorithms.interface import Done, Failed, LocalTrainer, Work
from choral.trainers.engines.rank_messages import (
    Tensors,
    bytes_of,
    error_as_message,
    orders_as_message,
    packed,
    results_as_message,
    results_of,
    unpacked,
    work_of,
)
from choral.trainers.run_folder.info import RoundRecord, RunInfo
from choral.trainers.run_folder.run import Run
from choral.trainers.task.seeding import caller_keeps_generators
from choral.trainers.task.task import TaskError

_PATIENCE = timedelta(days=1)  # a dead process is noticed at once by its closed connection
_AHEAD = 4  # messages of results that wait at a rank until rank 0 takes them
_TOGETHER = 0.003  # seconds for which results are gathered into one message: a message costs as much as a small party
_LARGE = 1 << 20  # bytes of results that are kept back at most
_CHUNK = 64  # parties per rank that are told of at once
_Sent = tuple[int, list[Any], tuple[torch.Tensor, torch.Tensor]]  # to whom, the sendings, what must live until then


class ProcessError(ChoralError):
    """Another process of this run died, or ended with an error of its own."""


class RankSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What the other ranks must know before the first round. folder: of the ledgers, if there are any.

    clips: of parties whose clipping norm adapts, in a resumed run.
    """

    rounds_left: int
    folder: str | None = None
    clips: dict[str, float] = {}


@dataclass
class RankGroup:
    """The processes of a run, seen from one of them. rank: whose view this is, of `size`."""

    rank: int
    size: int
    group: Any = field(repr=False)
    _arrived: dict[int, deque[tuple[str, Done | Failed]]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def join(cls) -> RankGroup | None:
        """The processes that torchrun started with this one, or None if there is only one.

        A run has connections of its own, beside those of the caller's or of another run. Raises: ProcessError if the
        others cannot be reached.
        """
        if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) < 2):
            return None
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
            if dist.get_world_size() < 2:
                return None
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the processes of this run do not find one another: {error}",
                hint="start the script with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
            ) from None
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def begin(self, setup: RankSetup) -> None:
        """Tell the other ranks that rounds are coming."""
        self._tell({"begin": msgspec.to_builtins(setup)}, {})

    def parties_of(self, rank: int, examples: Mapping[str, int]) -> tuple[str, ...]:
        """Who stays at a rank for a whole run."""
        places = _balanced(examples, examples.__getitem__, self.size)
        return tuple(party for party, place in places.items() if place == rank)

    def follow(self, make: Callable[[RankSetup], LocalTrainer]) -> Run:
        """What ranks other than 0 do: train what they are told to, until there is a run. make: called once."""
        try:
            return self._follow(make)
        finally:
            self.leave()

    def _follow(self, make: Callable[[RankSetup], LocalTrainer]) -> Run:
        trainer: LocalTrainer | None = None
        while True:
            header, tensors = self._receive(0)
            if "run" in header:
                return Run(
                    info=msgspec.convert(header["run"], RunInfo),
                    history=tuple(msgspec.convert(entry, RoundRecord) for entry in header["history"]),
                    state=tensors,
                )
            if "begin" in header:
                trainer = make(msgspec.convert(header["begin"], RankSetup))
            elif trainer is not None:
                self._train(trainer, header, tensors)

    def _train(self, trainer: LocalTrainer, header: dict[str, Any], tensors: Tensors) -> None:
        orders = [(order["party"], work_of(order, tensors)) for order in header["orders"]]
        waiting: deque[_Sent] = deque()
        results: list[tuple[str, Done | Failed]] = []

        def send() -> None:
            while len(waiting) >= max(_AHEAD, _kept(results[0][1])):
                _wait(waiting.popleft())
            waiting.append(self._send_later(0, packed(*results_as_message(results))))
            results.clear()

        try:
            sent = time.monotonic()
            with caller_keeps_generators():
                for party, done in trainer.do(orders, tensors["weights"].to(_device(trainer)), header["round"]):
                    results.append((party, done))
                    if time.monotonic() - sent >= _TOGETHER or bytes_of(done) * len(results) >= _LARGE:
                        send()
                        sent = time.monotonic()
            if results:
                send()
        except Exception as error:
            if results:
                send()
            waiting.append(self._send_later(0, packed(error_as_message(error), {})))
        while waiting:
            _wait(waiting.popleft())

    def share(self, run: Run) -> Run:
        """Give the finished run to the other ranks."""
        header = {"run": msgspec.to_builtins(run.info), "history": msgspec.to_builtins(run.history)}
        self._tell(header, run.state)
        return run

    def leave(self) -> None:
        """Close the connections, so that no other rank waits for this one for ever."""
        dist.destroy_process_group(self.group)
        self.group = None  # they close with the last reference

    def ask(self, rank: int, header: dict[str, Any], tensors: Tensors) -> None:
        self._send(rank, packed(header, tensors))

    def heard(self, rank: int) -> bool:
        """Whether a result of that rank is here already."""
        return bool(self._arrived.get(rank))

    def answer(self, rank: int, party: str, round_number: int) -> Done | Failed:
        """What a rank made of a party's work. Raises: ProcessError; TaskError as it raised it."""
        arrived = self._arrived.setdefault(rank, deque())
        if not arrived:
            header, tensors = self._receive(rank, f" in round {round_number}")
            self._refuse_error(rank, header)
            arrived.extend(results_of(header, tensors))
        answered, done = arrived.popleft()
        if answered != party:
            raise ProcessError(f"rank {rank} answered for party {answered!r}, expected {party!r}")
        return done

    def _refuse_error(self, rank: int, header: dict[str, Any]) -> None:
        if "error" in header:
            known = header["error"] == TaskError.__name__
            kind, text = (TaskError, header["text"]) if known else (ProcessError, f"rank {rank}: {header['text']}")
            raise kind(text, hint=header["hint"])

    def _tell(self, header: dict[str, Any], tensors: Tensors) -> None:
        raw = packed(header, tensors)
        for rank in range(self.size):
            if rank != self.rank:
                self._send(rank, raw)

    def _send(self, rank: int, raw: torch.Tensor) -> None:
        _wait(self._send_later(rank, raw))

    def _send_later(self, rank: int, raw: torch.Tensor) -> _Sent:
        length = torch.tensor([raw.numel()])
        try:  # even the length, whose sending would wait until the other rank asks for it
            works = [dist.isend(part, rank, group=self.group) for part in (length, raw)]
            return rank, works, (length, raw)
        except RuntimeError:
            raise _lost(rank, "") from None

    def _receive(self, rank: int, when: str = "") -> tuple[dict[str, Any], Tensors]:
        length = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(length, rank, group=self.group)
            raw = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(raw, rank, group=self.group)
        except RuntimeError:
            raise _lost(rank, when) from None
        return unpacked(raw)


class Sharded:
    """Rank 0's trainer: each chunk of a cohort is spread over all ranks, its own share done by `inner`."""

    def __init__(self, ranks: RankGroup, inner: LocalTrainer, examples: Mapping[str, int], *, sticky: bool) -> None:
        self._ranks, self._inner, self._examples = ranks, inner, examples
        self._places = _balanced(examples, examples.__getitem__, ranks.size) if sticky else None

    @property
    def length(self) -> int:
        return self._inner.length

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """See :class:`choral.trainers.algorithms.interface.LocalTrainer`. Raises: ProcessError, too."""
        orders = iter(orders)
        while chunk := list(islice(orders, _CHUNK * self._ranks.size)):
            yield from self._chunk(chunk, weights, round_number)

    def _chunk(
        self, chunk: list[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        names = [party for party, _ in chunk]
        places = self._places or _balanced(names, self._examples.__getitem__, self._ranks.size)
        for rank in range(1, self._ranks.size):
            theirs = [(party, work) for party, work in chunk if places[party] == rank]
            if theirs:
                orders, tensors = orders_as_message(theirs)
                self._ranks.ask(rank, {"round": round_number, "orders": orders}, {"weights": weights, **tensors})
        own = iter(self._inner.do([(p, w) for p, w in chunk if places[p] == 0], weights, round_number))
        early: deque[tuple[str, Done | Failed]] = deque()
        for party, _ in chunk:
            if places[party] == 0:
                yield early.popleft() if early else next(own)
            else:
                # Rather train on than wait for others: each time that a process sleeps it loses its caches.
                while not self._ranks.heard(places[party]) and (not early or len(early) < _kept(early[0][1])):
                    if (made := next(own, None)) is None:
                        break
                    early.append(made)
                done = self._ranks.answer(places[party], party, round_number)
                if isinstance(done, Done):
                    done = dataclasses.replace(done, vector=done.vector.to(weights.device))
                yield party, done


@contextmanager
def led(ranks: RankGroup | None) -> Iterator[Callable[[Run], Run]]:
    """What rank 0 does its work in: it gets what gives the run to the others; in the end they are let go."""
    if ranks is None:
        yield lambda run: run
        return
    try:
        yield ranks.share
    finally:
        ranks.leave()


def _balanced(parties: Iterable[str], examples: Callable[[str], int], ranks: int) -> dict[str, int]:
    """Each party's rank: in the order given, the one with the fewest examples so far, so that all keep abreast."""
    loads, places = [0] * ranks, {}
    for party in parties:
        rank = loads.index(min(loads))
        loads[rank] += examples(party)
        places[party] = rank
    return places


def _kept(done: Done | Failed) -> int:
    """How many results like this one a rank may have made before they are asked for: 1 MiB, and one at least."""
    return max(1, _LARGE // max(bytes_of(done), 1))


def _wait(sent: _Sent) -> None:
    rank, works, _ = sent
    try:
        for work in works:
            work.wait()
    except RuntimeError:
        raise _lost(rank, "") from None


def _lost(rank: int, when: str) -> ProcessError:
    return ProcessError(
        f"rank {rank} has gone{when}",
        hint="its own output says why; the folder keeps the last good round, from which resume goes on",
    )


def _device(trainer: LocalTrainer) -> torch.device:
    device: torch.device = getattr(getattr(trainer, "resident", trainer), "device", torch.device("cpu"))
    return device
