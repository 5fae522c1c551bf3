"""What a plan refuses, before any harm: every refusal with its words, its hint, and the one line that raises it."""

from __future__ import annotations

import ast
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from choral import (
    ClientPrivacy,
    Compute,
    Encoding,
    Keep,
    Masked,
    Participation,
    Plain,
    Policy,
    Privacy,
    Task,
    centralize,
    federate,
)
from choral.errors import ChoralError, ConfigError, DataError
from choral.protocols import SpecError
from choral.trainers import DANE, FSVRG, Schedule, TaskError, VirtualParties
from choral.trainers.algorithms import FedAvg, FedSGD, Scaffold
from choral.trainers.federated.participation import Availability, Clock, Device, Dropouts
from choral.trainers.federated.plan import Plan
from choral.trainers.task.initial_weights import InitialWeightsError

ROOT = Path(__file__).resolve().parents[3]
PARTIES = {name: TensorDataset(torch.zeros(8, 2), torch.arange(8) % 2) for name in ("north", "south", "east")}
RECORD = Privacy(epsilon=3.0, delta=1e-3, max_grad_norm=1.0, epochs=1)
CLIENT = ClientPrivacy(epsilon=3.0, delta=1e-3, clip=1.0)
SHARES = Privacy(epsilon=3.0, delta=1e-3, noise="distributed")
HELD = {name: TensorDataset(torch.ones(8, 2), torch.arange(8) % 2) for name in PARTIES}


def never(*_: Any) -> Any:
    raise AssertionError("nothing of the user's is called before the refusal")


def build(dataset: Any) -> Any:
    return never(dataset)


def fit(model: Any, optimizer: Any, loader: Any) -> None:
    never()


def evaluate(model: Any) -> float:
    return float(never())


def task(**changes: Any) -> Task:
    return Task(**{"build": build, "fit": fit, "evaluate": evaluate} | changes)


def plan(**changes: Any) -> Plan:
    return Plan.of(**{"task": task(), "parties": PARTIES, "rounds": 3} | changes)


def loss(model: Any, batch: Any) -> Any:
    return never()


def of_two(model: Any, optimizer: Any) -> None:
    never()


FEW = {"one": PARTIES["north"]}
ALIKE = {name: TensorDataset(torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)) for name in PARTIES}
MANY = VirtualParties(50, lambda number: PARTIES["north"], 8)
NEEDS = task(loss=loss)

# Each refusal of a plan: how to provoke it, its kind, and words of it. The groups refuse as they are made.
REFUSALS: list[tuple[Callable[[], Any], type[ChoralError], str]] = [
    (lambda: plan(task=Task), ConfigError, "task is the class Task"),
    (lambda: plan(task=build), ConfigError, "task is a function, expected Task"),
    (lambda: plan(parties=list(PARTIES.values())), ConfigError, "parties is a list, expected a mapping of names"),
    (lambda: plan(participation=0.5), ConfigError, "participation is 0.5, expected Participation"),
    (lambda: plan(encoding={"value_bound": 3}), ConfigError, "encoding is a dict, expected Encoding"),
    (lambda: plan(compute="cuda"), ConfigError, "compute is 'cuda', expected Compute"),
    (lambda: plan(keep="runs/first"), ConfigError, "keep is 'runs/first', expected Keep"),
    (lambda: plan(rounds=True), ConfigError, "rounds is True, expected a whole number"),
    (lambda: plan(rounds=2.0), ConfigError, "rounds is 2.0, expected a whole number"),
    (lambda: plan(rounds=0), ConfigError, "expected rounds >= 1, got 0"),
    (lambda: plan(algorithm="fedprx"), ConfigError, "algorithm is 'fedprx', expected an Algorithm"),
    (lambda: plan(algorithm=FedAvg), ConfigError, "algorithm is the class FedAvg"),
    (lambda: plan(secure_sum="mask"), ConfigError, "secure_sum is 'mask', expected a secure sum, or one of plain"),
    (lambda: plan(secure_sum=Masked), ConfigError, "secure_sum is the class Masked, expected a secure sum"),
    (lambda: plan(privacy=3.0), ConfigError, "privacy is 3.0, expected Privacy or ClientPrivacy"),
    (lambda: plan(privacy=Privacy), ConfigError, "privacy is the class Privacy"),
    (lambda: plan(algorithm="gd"), TaskError, "gd needs the gradients of the records, and the task has no loss"),
    (lambda: plan(task=NEEDS, algorithm="gd", privacy=RECORD), ConfigError, "gd also releases grad F_k(w_t)"),
    (lambda: plan(task=NEEDS, algorithm=FSVRG(), privacy=CLIENT), ConfigError, "'counts' exchange releases is not one"),
    (lambda: plan(task=NEEDS, algorithm="cocoa", privacy=CLIENT), ConfigError, "clipping breaks that"),
    (
        lambda: plan(task=NEEDS, algorithm="cocoa", encoding=Encoding(weights="equal")),
        ConfigError,
        'cocoa with weights="equal": what a party sends grows with the records',
    ),
    (
        lambda: plan(task=NEEDS, algorithm=FSVRG(), encoding=Encoding(weights="equal")),
        ConfigError,
        'fsvrg with weights="equal": what a party sends grows with the records',
    ),
    (
        lambda: plan(task=NEEDS, algorithm=FedSGD(), privacy=SHARES, encoding=Encoding(weights="equal")),
        ConfigError,
        "a step sums the records that were drawn, and a party with more of them counts for more",
    ),
    (lambda: plan(parties=FEW), ConfigError, "expected at least 2 parties, got 1"),
    (lambda: plan(parties={"": PARTIES["north"], **FEW}), ConfigError, "party names must be non-empty strings"),
    (lambda: plan(parties={"a\n": PARTIES["north"], **FEW}), ConfigError, "is too long or not printable"),
    (lambda: plan(parties={"a": iter([]), **FEW}), DataError, "a dataset without a length"),
    (lambda: plan(parties={"a": [], **FEW}), DataError, "party 'a' has no records"),
    (lambda: plan(parties=ALIKE), DataError, "has 1 class in 8 records; expected at least 2"),
    (lambda: plan(parties=MANY), ConfigError, "virtual parties need a cohort"),
    (
        lambda: plan(parties=MANY, participation=Participation(cohort=3), privacy=RECORD),
        ConfigError,
        "which virtual parties have not",
    ),
    (lambda: plan(task=task(held_out=HELD)), ConfigError, "evaluate_party is not given"),
    (lambda: plan(compute=Compute(device="tpu")), TaskError, "device 'tpu' is not available here"),
    (lambda: plan(task=task(initial_weights="weights.pt")), InitialWeightsError, "not a .safetensors file"),
    (lambda: plan(compute=Compute(precision="fp16")), ConfigError, "expected precision 'float32' or 'bf16'"),  # type: ignore[arg-type]
    (lambda: plan(compute=Compute(compile=True), privacy=RECORD), ConfigError, "compile with record-level privacy"),
    (
        lambda: plan(task=NEEDS, algorithm="gd", compute=Compute(compile=True)),
        ConfigError,
        "compile with an algorithm that reads gradients",
    ),
    (lambda: plan(participation=Participation(cohort=4)), ConfigError, "expected a cohort of 2 to 3 parties, got 4"),
    (lambda: plan(participation=Participation(rate=0.9, least=9)), ConfigError, "participation.least of 2 to 3, got 9"),
    (
        lambda: plan(algorithm=Scaffold(), participation=Participation(cohort=2)),
        ConfigError,
        "scaffold needs every party",
    ),
    (
        lambda: plan(task=NEEDS, algorithm=DANE(), secure_sum=Masked(), participation=Participation(patience=2)),
        ConfigError,
        "dane has several sums in a round",
    ),
    (
        lambda: plan(task=task(loss=loss, schedule=Schedule(kind="cosine")), algorithm=DANE()),
        ConfigError,
        "the schedule is of the learning rate of fit, which dane does not call",
    ),
    (lambda: plan(keep=Keep(tuning={"grid": {}}), privacy=RECORD), ConfigError, "tuning with privacy"),
    (
        lambda: plan(privacy=Privacy(epsilon=3.0, delta=1e-3, max_grad_norm=1.0, epochs=1, ledger="ledger.jsonl")),
        ConfigError,
        "is one data owner's",
    ),
    (
        lambda: plan(privacy=Privacy(epsilon=3.0, delta=0.2, max_grad_norm=1.0, epochs=1)),
        ConfigError,
        "delta = 0.2 is not below 1/n",
    ),
    (lambda: plan(privacy=ClientPrivacy(epsilon=3.0, delta=0.5, clip=1.0)), ConfigError, "delta is 0.5"),
    (
        lambda: plan(privacy=ClientPrivacy(epsilon=3.0, delta=1e-3, clip=1.0, min_survivors=9)),
        ConfigError,
        "min_survivors is 9 of 3 clients",
    ),
    (lambda: task(build=3), ConfigError, "build is 3, expected a function"),
    (lambda: task(fit=of_two), ConfigError, "fit is called as fit(model, optimizer, loader), and cannot be"),
    (lambda: task(evaluate=of_two), ConfigError, "evaluate is called as evaluate(model), and cannot be"),
    (lambda: task(loss=evaluate), ConfigError, "loss is called as loss(model, batch), and cannot be"),
    (lambda: task(schedule="cosine"), ConfigError, "schedule is 'cosine', expected Schedule"),
    (lambda: task(min_classes=0), ConfigError, "expected min_classes >= 1, got 0"),
    (lambda: Encoding(value_bound="16"), ConfigError, "value_bound is '16', expected a number"),  # type: ignore[arg-type]
    (lambda: Encoding(value_bound=0.0), ConfigError, "bound is 0.0, expected a finite number > 0"),
    (lambda: Encoding(value_bits=99), ConfigError, "value_bits is 99, expected 2 to 48"),
    (lambda: Encoding(weights="even"), ConfigError, "weights is 'even', expected 'examples' or 'equal'"),  # type: ignore[arg-type]
    (lambda: Encoding(policy=Policy), SpecError, "expected a Policy"),  # type: ignore[arg-type]
    (lambda: Compute(seed=-1), ConfigError, "expected seed >= 0, got -1"),
    (lambda: Compute(seed="0"), ConfigError, "seed is '0', expected a whole number"),  # type: ignore[arg-type]
    (lambda: Compute(device=0), ConfigError, "device is 0, expected str"),  # type: ignore[arg-type]
    (lambda: Compute(compile="yes"), ConfigError, "compile is 'yes', expected True or False"),  # type: ignore[arg-type]
    (lambda: Compute(engine="direct"), ConfigError, "engine is 'direct', expected a function"),  # type: ignore[arg-type]
    (lambda: Participation(cohort="2"), ConfigError, "cohort is '2', expected a whole number"),  # type: ignore[arg-type]
    (lambda: Participation(least=True), ConfigError, "least is True, expected a whole number"),
    (lambda: Participation(patience=math.inf), ConfigError, "patience is inf, expected a whole number"),  # type: ignore[arg-type]
    (lambda: Participation(rate=True), ConfigError, "rate is True, expected a number"),
    (lambda: Participation(deadline="5"), ConfigError, "deadline is '5', expected a number"),  # type: ignore[arg-type]
    (lambda: Participation(dropouts=0.1), ConfigError, "participation.dropouts is 0.1"),  # type: ignore[arg-type]
    (lambda: Participation(clock=Clock), ConfigError, "participation.clock is the class Clock"),  # type: ignore[arg-type]
    (lambda: Dropouts(keys="0"), ConfigError, "keys is '0', expected a number"),  # type: ignore[arg-type]
    (lambda: Device(start=True), ConfigError, "start is True, expected a number"),
    (lambda: Availability(peak="1"), ConfigError, "peak is '1', expected a number"),  # type: ignore[arg-type]
    (lambda: Availability(zones="0"), ConfigError, "zones is '0', expected tuple or list"),  # type: ignore[arg-type]
    (lambda: Availability(zones=("0",)), ConfigError, "a zone is '0', expected a number"),  # type: ignore[arg-type]
    (lambda: Clock(first=None), ConfigError, "first is None, expected a number"),  # type: ignore[arg-type]
    (lambda: Keep(out=""), ConfigError, "out is empty"),
    (lambda: Keep(out=3), ConfigError, "out is 3, expected str or Path"),  # type: ignore[arg-type]
    (lambda: Keep(resume=1), ConfigError, "resume is 1, expected True or False"),  # type: ignore[arg-type]
    (lambda: Keep(resume=True), ConfigError, "resume needs the folder of the run"),
    (lambda: Keep(config=["a"]), ConfigError, "config is a list, expected Mapping"),  # type: ignore[arg-type]
    (lambda: Keep(out="run", transcript="all"), ConfigError, "expected one of digests"),  # type: ignore[arg-type]
    (lambda: Keep(transcript="digests"), ConfigError, "a transcript is kept in the run's folder"),
    (lambda: Keep(on_round=lambda: None), ConfigError, "on_round is called as on_round(entry)"),  # type: ignore[misc,arg-type]
]


def raised_at(error: BaseException) -> tuple[str, int]:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return str(Path(frame.filename).resolve()), frame.lineno or 0


@pytest.mark.parametrize(("bad", "kind", "words"), REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_a_plan_refuses_with_what_was_expected(bad: Callable[[], Any], kind: type[ChoralError], words: str) -> None:
    with pytest.raises(kind) as said:
        bad()
    assert type(said.value) is kind
    assert words in str(said.value)


def test_each_refusal_has_one_line_that_raises_it() -> None:
    """The fixed words of a refusal stand in one `raise` of the source, not in a second place that checks it again."""
    sources = [path for folder in ("trainers", "src/choral/jobs") for path in (ROOT / folder).rglob("*.py")]
    said: dict[str, set[tuple[str, int]]] = {}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                first = node.exc.args[0]
                parts = first.values if isinstance(first, ast.JoinedStr) else [first]
                fixed = "|".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
                said.setdefault(fixed, set()).add((str(path), node.lineno))
    lines = {}
    for bad, kind, words in REFUSALS:
        with pytest.raises(kind) as error:
            bad()
        lines[words] = raised_at(error.value)
    again = {}
    for words, (file, number) in lines.items():
        for fixed, places in said.items():
            if (file, number) in {(str(Path(each).resolve()), line) for each, line in places} and len(fixed) > 25:
                again |= {words: places} if len(places) > 1 else {}
    assert not again
    assert len(set(lines.values())) > 30


def test_types_that_are_as_good_are_taken() -> None:
    """numpy's whole numbers, names as TOML has them in any case, functions that take more than they must."""
    made = plan(
        task=task(fit=lambda model, optimizer, loader, round, more=1: never(), evaluate=lambda *models: never()),
        rounds=np.int64(3),
        algorithm="FedProx",
        secure_sum="Masked",
        compute=Compute(seed=np.int32(4)),
        encoding=Encoding(value_bound=np.float32(2), value_bits=np.int16(20)),
    )
    assert (made.rounds, type(made.rounds), made.compute.seed) == (3, int, 4)
    assert (made.algorithm.kind, made.secure_sum.name, made.encoding.value_bits) == ("fedprox", "masked", 20)
    taken = Participation(cohort=np.int64(2), deadline=np.float32(5), availability=Availability(zones=[1, 2.5]))  # type: ignore[arg-type]
    assert (type(taken.cohort), type(taken.deadline), taken.availability.zones) == (int, float, (1.0, 2.5))
    for promise in (
        Privacy(epsilon=np.float32(3), delta=np.float32(1e-3), max_grad_norm=1.0, epochs=1),
        ClientPrivacy(epsilon=np.float32(3), delta=np.float32(1e-3), clip=1.0),
    ):
        assert (promise.epsilon, type(promise.epsilon), type(promise.delta)) == (3.0, float, float)
    assert plan(secure_sum="homomorphic").secure_sum.name == "homomorphic"
    assert plan(secure_sum="plain").secure_sum == plan().secure_sum == Plain()


def test_a_task_brings_its_parties_unless_others_are_given() -> None:
    mine = task(parties=PARTIES)
    assert list(Plan.of(mine, rounds=1).census.names) == list(PARTIES)
    assert list(Plan.of(mine, dict(list(PARTIES.items())[:2]), rounds=1).census.names) == ["north", "south"]
    with pytest.raises(ConfigError, match="at least 2 parties, got 0"):
        Plan.of(task(), rounds=1)


def test_nothing_is_written_where_a_plan_refuses(tmp_path: Path) -> None:
    for train in (federate, centralize):
        with pytest.raises(ConfigError, match="rounds is True"):
            train(task(), PARTIES, rounds=True, keep=Keep(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pooled_data_have_no_transcript(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooled data has none"):
        centralize(task(), PARTIES, rounds=1, keep=Keep(out=tmp_path / "run", transcript="digests"))
