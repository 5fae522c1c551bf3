"""What tests call `federate` and `centralize` by passes every name on, and hides none that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from flat_arguments import centralize, federate, grouped

from choral import Keep, Participation

JOB: dict[str, Any] = {"build": lambda dataset: None, "fit": lambda m, o, loader: None, "evaluate": lambda model: 0.0}


def test_a_name_goes_to_the_group_that_has_it() -> None:
    made = grouped(**JOB, rounds=2, value_bits=20, seed=3, config={"a": 1}, dropout_rate=0.25)
    assert (made["rounds"], made["encoding"].value_bits, made["compute"].seed) == (2, 20, 3)
    assert (made["keep"].config, made["participation"].dropouts.vector) == ({"a": 1}, 0.25)


@pytest.mark.parametrize("call", [federate, centralize])
@pytest.mark.parametrize("wrong", [{"round": 2}, {"local_epochs": 1}, {"secure": "masked"}])
def test_a_name_that_nothing_has_is_refused(call: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
        call(**JOB, parties={}, rounds=1, **wrong)


@pytest.mark.parametrize(
    ("given", "name"),
    [({"value_bound": 2.0}, "encoding"), ({"cohort": 2}, "participation"), ({"algorithm": "gd"}, "algorithm")],
)
def test_pooled_training_refuses_what_is_of_parties(given: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        centralize(**JOB, parties={}, rounds=1, **given)


@pytest.mark.parametrize(
    ("given", "group"),
    [({"keep": Keep(), "out": "run"}, "keep"), ({"participation": Participation(), "cohort": 2}, "participation")],
)
def test_a_group_beside_a_name_of_its_own_is_refused(given: dict[str, Any], group: str) -> None:
    with pytest.raises(TypeError, match=f"given both whole and by names of its own: {group}"):
        federate(**JOB, parties={}, rounds=1, **given)
