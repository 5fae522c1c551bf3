"""What a round costs beside a loop that makes the same calls of algorithm, trainer, codec and secure sum by hand.

Ten parties, 100,100 weights, one local epoch; both rounds in turns, in one process on one thread, in processor time.
The loop checks nothing, selects and times nobody, and puts nobody's generators back. Prints a line of JSON for each sum
with the ratio of the medians. With the masked sum about 0.2 ms of both are the SHA-256 of the weights, which every
party signs.

    python benchmarks/round_overhead.py [--rounds 100] [--records 20] [--private]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Plain, Privacy, Task
from choral.trainers import Epochs, FedAvg
from choral.trainers.algorithms.interface import Party, Server
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.one_round import Steps, one_round
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.session import Session

PARTIES, FEATURES, CLASSES = 10, 1000, 100


def make(number: int, records: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(number)
    return TensorDataset(torch.randn(records, FEATURES, generator=generator), torch.arange(records) % CLASSES)


def build(dataset: TensorDataset) -> Any:
    model = nn.Linear(FEATURES, CLASSES)
    return model, torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(dataset, batch_size=10, shuffle=True)


def by_hand(session: Session, number: int) -> torch.Tensor:
    """The next weights, by the same calls."""
    algorithm, engine, examples = session.plan.algorithm, session.engine, session.plan.census.examples
    federation = session.terms.federation
    steps = Steps(algorithm.round(Server(federation=federation, number=number, state={}), session.weights))
    if (ask := steps.advance(None)) is None:
        raise RuntimeError("an algorithm that asks for nothing")
    codec = session.codecs[ask.channel]
    told = Told.of(ask, number, 0)
    codec.begin(tuple(examples), lambda: told.digest)
    opened = session.sums[ask.channel]
    summing = opened.session.begin({}, None if opened.plain else told.terms(session.terms.digest))
    views = {
        name: Party(name=name, examples=count, federation=federation, number=number, state={})
        for name, count in examples.items()
    }

    def orders() -> Iterator[tuple[str, Any]]:
        for name, view in views.items():
            yield name, algorithm.work(view, ask)

    for name, done in engine.trainer.do(orders(), ask.weights, number):  # type: ignore[attr-defined]
        encoded = codec.party(examples[name]).encode(algorithm.answer(views[name], ask, done))
        summing.submit(name, encoded.vector)
        codec.take(encoded)
    steps.advance(codec.decode(summing.finish()))
    return steps.weights


def measure(session: Session, rounds: int) -> dict[str, Any]:
    seconds: dict[Callable[[Session, int], Any], list[float]] = {one_round: [], by_hand: []}
    for number in range(1, rounds + 2):  # the first one warms up
        for play in (one_round, by_hand) if number % 2 else (by_hand, one_round):
            started = time.process_time()
            play(session, number)
            seconds[play].append(time.process_time() - started)
    whole, loop = (statistics.median(seconds[play][1:]) for play in (one_round, by_hand))
    return {"round_ms": round(1e3 * whole, 2), "by_hand_ms": round(1e3 * loop, 2), "ratio": round(whole / loop, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    privacy = Privacy(epsilon=8.0, delta=1e-4, max_grad_norm=1.0, epochs=1) if args.private else None
    parties = {f"p{number}": make(number, args.records) for number in range(PARTIES)}
    task = Task(build=build, fit=Epochs(), evaluate=lambda _: {"nothing": 0.0})
    for kind in (Masked(corrupt=1), Plain()):
        plan = Plan.of(task, parties, rounds=2 * args.rounds + 2, algorithm=FedAvg(), secure_sum=kind, privacy=privacy)
        with Session.open(plan) as opened:
            print(json.dumps({"secure_sum": kind.name, **measure(opened, args.rounds)}), flush=True)


if __name__ == "__main__":
    main()
