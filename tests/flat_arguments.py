"""`federate` and `centralize` by one flat set of names, since tests vary what these take in groups one by one.

    federate(build=build, fit=fit, evaluate=evaluate, parties=parties, rounds=3, seed=1, out=folder)

Each name is moved into its group (`Task`, `Encoding`, `Compute`, `Keep`), and the public function is called.
``cohort`` and ``dropout_rate`` go into a `Participation`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import choral
from choral import Compute, Encoding, Keep, Participation, Run, Task
from choral.trainers import Dropouts

_GROUPS: dict[str, Any] = {"task": Task, "encoding": Encoding, "compute": Compute, "keep": Keep}


def federate(**flat: Any) -> Run:
    return choral.federate(**grouped(**flat))


def centralize(**flat: Any) -> Run:
    return choral.centralize(**grouped(**{name: value for name, value in flat.items() if name != "encoding"}))


def grouped(**flat: Any) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name, kind in _GROUPS.items():
        fields = {field.name for field in dataclasses.fields(kind)} - ({"parties", "engine"} if kind is Task else set())
        found[name] = {field: flat.pop(field) for field in fields & set(flat)}
    if "cohort" in flat or "dropout_rate" in flat:
        lost = Dropouts(vector=flat.pop("dropout_rate", 0.0))
        flat["participation"] = Participation(cohort=flat.pop("cohort", None), dropouts=lost)
    return {name: _GROUPS[name](**fields) for name, fields in found.items() if fields} | flat
