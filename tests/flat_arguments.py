"""`federate` and `centralize` by one flat set of names, for tests that vary one argument of a job at a time.

    federate(build=build, fit=fit, evaluate=evaluate, parties=parties, rounds=3, seed=1, out=folder)
    federate(**job(rounds=1), weights="equal")     # one name over those of a fixture

A fixture gives a whole job as one dict, and each test replaces one name of it, in whatever group (`Task`, `Encoding`,
`Compute`, `Keep`, `Participation`) that name is; with the groups themselves every test would take them apart. Nothing
is decided here: each name goes to the one group that has it, and what no group has goes on to the public function,
which raises TypeError for a name that it does not know, as for a name of `Encoding` or `Participation` given to
`centralize`. ``cohort`` and ``dropout_rate`` go into a `Participation`.
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
    return choral.centralize(**grouped(**flat))


def grouped(**flat: Any) -> dict[str, Any]:
    """Raises: TypeError for a group that is given beside names of its own, one of which would be lost."""
    found: dict[str, dict[str, Any]] = {}
    for name, kind in _GROUPS.items():
        fields = {field.name for field in dataclasses.fields(kind)} - ({"parties", "engine"} if kind is Task else set())
        found[name] = {field: flat.pop(field) for field in fields & set(flat)}
    made = {name: _GROUPS[name](**fields) for name, fields in found.items() if fields}
    if "cohort" in flat or "dropout_rate" in flat:
        lost = Dropouts(vector=flat.pop("dropout_rate", 0.0))
        made["participation"] = Participation(cohort=flat.pop("cohort", None), dropouts=lost)
    if both := made.keys() & flat.keys():
        raise TypeError(f"given both whole and by names of its own: {', '.join(sorted(both))}")
    return made | flat
