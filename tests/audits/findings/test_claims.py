"""The sentence of a promise: whom it holds off, and who has to be trusted, by who adds the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from choral.audits.findings.claims import sentence_parts
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
