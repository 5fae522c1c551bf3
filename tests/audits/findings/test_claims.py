"""The sentence of a promise: whom it holds off, who has to be trusted, and that its numbers are numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from choral.audits.findings.claims import check_costs, sentence_parts
from choral.errors import DataError
from choral.trainers.run_folder.run import Run

MakeRun = Callable[..., Run]


@pytest.mark.parametrize(
    ("arm", "adversary", "trust"),
    [
        ("cloud-dp", "the trained model, after any step", "cloud itself holds the raw data and has to be trusted"),
        ("federated-dp", "the server and all other parties included", "Each party adds its own noise"),
    ],
)
def test_of_records(arm: str, adversary: str, trust: str, make_run: MakeRun) -> None:
    said = sentence_parts(make_run(arm).info)
    assert adversary in said[0]
    assert trust in said[1]


@pytest.mark.parametrize(
    ("noise", "secure_sum", "adversary", "trust"),
    [
        ("local", "plain", "the server and all other clients included", "Each client adds all of the noise"),
        ("central", "masked", "the model after any round", "sum without noise and has to be trusted"),
        ("central", "plain", "the model after any round", "and each client's clipped update, and has to be trusted"),
        ("distributed", "masked", "2 of the other clients, the server included", "2 colluders, and counted by who"),
        (
            "distributed",
            "plain",
            "with up to 2 of the other clients",
            "sees each client's update with its share",
        ),
    ],
)
def test_of_clients_by_where_the_noise_is_added(
    noise: str, secure_sum: str, adversary: str, trust: str, make_client_run: MakeRun, make_run: MakeRun
) -> None:
    info: Any = make_client_run().info
    promise = {**info.privacy, "noise": noise, "colluders": 2}
    run = make_run("federated-dp", privacy=promise, spent=info.spent, secure_sum={"name": secure_sum})
    said = sentence_parts(run.info)
    assert said[0].endswith(adversary)
    assert trust in said[1]


def test_one_colluder_is_one(make_client_run: MakeRun) -> None:
    assert "with 1 colluder, and" in sentence_parts(make_client_run().info)[1]


@pytest.mark.parametrize(
    ("promised", "spent", "said"),
    [
        ({}, {}, ""),
        ({"epsilon": 0.0}, {}, "promises epsilon = 0"),
        ({"epsilon": math.inf}, {}, "promises epsilon = inf"),
        ({"epsilon": 0.5}, {"epsilon": 0.0}, ""),
        ({"delta": 0.0}, {}, "promises delta = 0"),
        ({"delta": 1.0}, {}, "promises delta = 1"),
        ({"delta": math.nan}, {}, "promises delta = nan"),
        ({}, {"epsilon": -1e-9}, "epsilon spent by pooled is -1e-09"),
        ({}, {"epsilon": math.inf}, "epsilon spent by pooled is inf"),
        ({}, {"epsilon": math.nan}, "epsilon spent by pooled is nan"),
        ({}, {"delta": 0.0}, ""),
        ({}, {"delta": 1.0}, "delta spent by pooled is 1"),
    ],
)
def test_a_promise_and_a_cost_are_numbers_in_range(
    promised: dict[str, float], spent: dict[str, float], said: str, make_run: MakeRun
) -> None:
    info: Any = make_run("cloud-dp").info
    costs = {"pooled": dataclasses.replace(info.spent["pooled"], **spent)}
    run = make_run("cloud-dp", privacy={**info.privacy, **promised}, spent=costs)
    with pytest.raises(DataError, match=said) if said else contextlib.nullcontext():
        check_costs(run.info, "run")


def test_a_run_that_promises_nothing_has_no_number_to_check(make_run: MakeRun) -> None:
    check_costs(make_run("cloud").info, "run")
