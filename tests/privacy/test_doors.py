"""Whatever is given to a public function or class of this room: an error of ours, or an honest result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from choral.errors import ChoralError
from choral.privacy import (
    AdaptiveClip,
    CorrelatedPrivacy,
    Ledger,
    PerLayerClip,
    Privacy,
    PrivacyEngine,
    private_search,
    replace_layers,
    unwrap,
)

THINGS: list[Any] = [
    *(None, "x", b"x", True, False, -1, 0, 1, 0.5, math.inf, math.nan, 10**400, complex(1, 1), [], [1], {}, {"a": 1}),
    *((), object(), torch.ones(2), torch.tensor(1.0), np.float32(1.0), np.ones(2), nn.Linear(2, 2), min),
]
DATA = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)


def promise(**settings: Any) -> Any:
    return Privacy(**{"epsilon": 3.0, "delta": 1e-3, "ledger": Ledger()} | settings)


def wrap(place: int | None = None, thing: Any = None, **settings: Any) -> Any:
    model = nn.Linear(6, 3)
    parts: list[Any] = [model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(DATA, batch_size=10)]
    if place is not None:
        parts[place] = thing
    return promise().wrap(*parts, **settings)


def checked(step: Callable[[Any, Any], Any]) -> Any:
    def door(thing: Any) -> None:
        model, _, loader = wrap()
        for batch in loader:
            model.check_step(step(model, thing), batch)
            break

    return door


def tried(thing: Any = None, **settings: Any) -> Any:
    given = {"candidates": [1], "train": lambda *_: (None, 1.0), "records": 600, "batch_size": 60, "mean": 2.0}
    return private_search(promise(), **given | settings)  # type: ignore[arg-type]


DOORS: dict[str, Callable[[Any], Any]] = {
    **{
        f"Privacy({name})": lambda thing, name=name: promise(**{name: thing})
        for name in ("epsilon", "delta", "max_grad_norm", "epochs", "max_physical_batch_size")
    },
    "Privacy(ledger)": lambda thing: promise(ledger=thing) if not isinstance(thing, str) else None,
    "Ledger": lambda thing: Ledger(thing) if not isinstance(thing, str) else None,
    **{
        f"CorrelatedPrivacy({name})": lambda thing, name=name: CorrelatedPrivacy(
            **{"epsilon": 3.0, "delta": 1e-3, "mechanism": "banded"} | {name: thing}
        )
        for name in ("mechanism", "bands", "max_grad_norm")
    },
    "PerLayerClip": PerLayerClip,
    "PerLayerClip of a layer": lambda thing: PerLayerClip({"a": thing}),
    **{
        f"AdaptiveClip({name})": lambda thing, name=name: AdaptiveClip(**{name: thing})
        for name in ("start", "quantile", "rate", "share")
    },
    "replace_layers": replace_layers,
    "unwrap": unwrap,
    "wrap a model": lambda thing: wrap(0, thing),
    "wrap an optimizer": lambda thing: wrap(1, thing),
    "wrap a loader": lambda thing: wrap(2, thing),
    "resume": lambda thing: wrap(resume=thing),
    "resume a plan": lambda thing: wrap(resume={"privacy": thing, "state": {}, "param_groups": []}),
    "check_step of no function": checked(lambda model, thing: thing if not callable(thing) else None),
    "check_step of no loss": checked(lambda model, thing: lambda batch: thing),
    "check_step of two losses": checked(lambda model, thing: lambda batch: cross_entropy(model(batch[0]), batch[1])),
    "search": lambda thing: private_search(thing, [1], min, records=600, batch_size=60, mean=2.0),
    **{
        f"search({name})": lambda thing, name=name: tried(**{name: thing})
        for name in ("candidates", "records", "batch_size", "mean", "shape")
    },
    "search by no function": lambda thing: tried(train=thing if not callable(thing) else None),
    "search without a score": lambda thing: tried(train=lambda *_: thing),
    "search by a score": lambda thing: tried(train=lambda *_: (None, thing)),
    "PrivacyEngine": lambda thing: PrivacyEngine(thing, holder="a", ledger=Ledger(), passes=1),
    "PrivacyEngine(holder)": lambda thing: PrivacyEngine(promise(), holder=thing, ledger=Ledger(), passes=1),
    "PrivacyEngine(ledger)": lambda thing: PrivacyEngine(promise(), holder="a", ledger=thing, passes=1),
    "PrivacyEngine(passes)": lambda thing: PrivacyEngine(promise(), holder="a", ledger=Ledger(), passes=thing),
}


@pytest.mark.parametrize("name", DOORS)
def test_whatever_is_given_the_error_is_ours(name: str) -> None:
    refused = 0
    for thing in THINGS:
        try:
            DOORS[name](thing)
        except ChoralError:
            refused += 1
    assert refused >= 10 or name in ("check_step of two losses", "unwrap")
