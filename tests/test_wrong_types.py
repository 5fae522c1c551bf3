"""Every argument of the front door and of its groups, given what it is not: taken, or refused in words, never a crash.

What a constructor takes for good although it is of another type is not seen here; each group's own tests say that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import choral
from choral import Task, audit, centralize, compare, federate
from choral.audits import ArmEvidence, Job, PriceSettings
from choral.errors import ChoralError
from choral.trainers import Epochs, Run, Schedule, Split, Training
from choral.trainers.algorithms import KINDS
from choral.trainers.federated.participation import Availability, Clock, Device, Dropouts
from choral.trainers.federated.plan import Plan

WRONG = {
    "none": None,
    "true": True,
    "minus one": -1,
    "half": 0.5,
    "nan": float("nan"),
    "huge": 10**40,
    "text": "text",
    "bytes": b"bytes",
    "list": ["a"],
    "mapping": {"a": 1},
    "tuple": (1, "x"),
    "object": object(),
    "class": dict,
    "function": lambda: 1,
    "tensor": torch.zeros(3),
    "number in a tensor": torch.tensor(float("nan")),
    "array": np.zeros(3),
    "complex": 1j,
    "set": {1},
    "module": nn.Linear(2, 2),
}
PARTIES = {name: TensorDataset(torch.zeros(8, 2), torch.arange(8) % 2) for name in ("a", "b", "c")}


def build(dataset: Any) -> Any:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=4)


TASK = Task(build=build, fit=Epochs(), evaluate=lambda _: {"x": 0.0})
GIVEN: dict[Any, dict[str, Any]] = {
    Task: {"build": build, "fit": Epochs(), "evaluate": TASK.evaluate},
    choral.Privacy: {"epsilon": 3.0, "delta": 1e-3, "max_grad_norm": 1.0, "epochs": 1},
    choral.ClientPrivacy: {"epsilon": 3.0, "delta": 1e-3, "clip": 1.0},
    choral.CorrelatedPrivacy: {"epsilon": 3.0, "delta": 1e-3},
    choral.Policy: {"corrupt": 1},
    Plan.of: {"task": TASK, "parties": PARTIES, "rounds": 1},
}
GROUPS = (
    *GIVEN,
    ArmEvidence,
    *(choral.Compute, choral.Encoding, choral.Keep, choral.Participation, Availability, Clock, Device, Dropouts),
    *(choral.Masked, choral.Homomorphic, choral.Plain, Epochs, Schedule, Split, Training, PriceSettings, Job),
    *KINDS.values(),
)


def refused(call: Any, given: dict[str, Any], names: Iterator[str] | Any) -> int:
    """How many of the wrong values were refused. Any other error than one in words fails the test."""
    count = 0
    for name in names:
        for what, value in WRONG.items():
            try:
                call(**{**given, name: value})
            except ChoralError as error:
                count += bool(str(error))
            except Exception as error:
                raise AssertionError(f"{name} given {what}: {error!r}") from error
    return count


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__qualname__)
def test_groups_refuse_in_words(group: Any) -> None:
    names = list(inspect.signature(group).parameters)
    count = refused(group, GIVEN.get(group, {}), names)
    assert count >= 8 * len(names)  # most of the twenty are wrong for any argument


def test_a_party_is_no_number_and_pooled_data_keep_no_promise_to_clients() -> None:
    names = [name for name in inspect.signature(centralize).parameters if name != "rounds"]
    assert refused(centralize, GIVEN[Plan.of], names) >= 8 * len(names)
    with pytest.raises(ChoralError, match="privacy is a ClientPrivacy, expected Privacy"):
        centralize(TASK, PARTIES, rounds=1, privacy=choral.ClientPrivacy(**GIVEN[choral.ClientPrivacy]))  # type: ignore[arg-type]
    for what in ("none", "half", "number in a tensor", "object", "function"):
        with pytest.raises(ChoralError, match="a dataset without a length"):
            Plan.of(TASK, {"a": WRONG[what], "b": PARTIES["b"]}, rounds=1)


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {"cloud": centralize(TASK, PARTIES, rounds=1), "fed": federate(TASK, PARTIES, rounds=1)}


def test_comparisons_and_audits_refuse_in_words(runs: dict[str, Run]) -> None:
    names = list(inspect.signature(compare).parameters)
    assert refused(compare, {"arms": runs, "metric": "x"}, names) >= 17 * len(names)
    names = list(inspect.signature(audit).parameters)
    assert refused(audit, {"run": runs["fed"]}, names) >= 17 * len(names)


@pytest.mark.parametrize("name", ["arms", "budgets", "references", "attacks", "probes", "failed"])
@pytest.mark.parametrize("listed", [False, True])
def test_what_a_mapping_of_comparisons_holds_is_looked_at(runs: dict[str, Run], name: str, listed: bool) -> None:
    for what, value in WRONG.items():
        if not listed and (name, what) in (("references", "mapping"), ("failed", "text")):
            continue
        given = {name: {"fed": [value] if listed else value}}
        call: Any = ArmEvidence if name in ("attacks", "probes", "failed") else partial(compare, metric="x")
        more = {} if call is ArmEvidence else {"arms": runs}
        with pytest.raises(ChoralError):
            call(**{**more, **given})
