"""A record for the OpenDP Deployments Registry is valid by the registry's schema, as `registry_fields.json` has it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from choral.audits import audit
from choral.audits.findings.context import Context
from choral.audits.report.reader.hazards import run_hazards
from choral.audits.report.reader.registry import as_yaml, registry_record
from choral.errors import ConfigError
from choral.trainers import Run

STATED = Context(
    purpose="Triage",
    curator="Three hospitals",
    curator_type="Nonprofit",
    region="Switzerland",
    sector="Healthcare",
    authors=("A. Bee",),
)
FIELDS = json.loads((Path(__file__).parent / "registry_fields.json").read_text("utf-8"))


def faults(record: object) -> list[str]:
    """What the registry's schema says against a record, dates included."""
    validator = jsonschema.Draft202012Validator(FIELDS, format_checker=jsonschema.FormatChecker())
    return [error.message for error in validator.iter_errors(record)]


@pytest.mark.parametrize("arm", ["federated-dp", "cloud-dp"])
def test_a_record_is_valid_by_the_registrys_schema(arm: str, make_run: Callable[..., Run]) -> None:
    record = registry_record(make_run(arm), STATED, "2026-11-29")
    assert faults(record) == []
    assert faults(yaml.safe_load(as_yaml(record))) == []
    deployment: dict[str, Any] = record["deployment"]
    assert deployment["deployment_model"]["model_name"] == ("Federated" if arm == "federated-dp" else "Central")
    assert deployment["privacy_loss"]["privacy_parameters"] == {"epsilon": pytest.approx(7.992), "delta": 1e-5}
    assert deployment["privacy_loss"]["number_of_privacy_units"] == 1365
    assert deployment["administrative"]["status"] == "Draft"
    assert "complies" not in str(record)


def test_a_record_for_clients_is_valid_too(make_client_run: Callable[..., Run]) -> None:
    record = registry_record(make_client_run(), STATED, "2026-11-29")
    assert faults(record) == []
    assert record["deployment"]["privacy_loss"]["number_of_privacy_units"] == 10


@pytest.mark.parametrize(
    ("part", "field", "value", "fault"),
    [
        ("basic", "author", "A", "Additional properties are not allowed"),
        ("basic", "publication_date", "1/1/2026", "is not a 'date'"),
        ("basic", "publication_date", dt.date(2026, 1, 1), "is not of type 'string'"),
        ("basic", "data_product_type", "surprise", "is not one of"),
        ("basic", "data_curators", [{"data_curator_name": "x"}], "'data_curator_type' is a required property"),
        ("administrative", "tier", 0, "is not one of"),
    ],
)
def test_the_schema_refuses_what_the_registrys_tests_do(
    part: str, field: str, value: object, fault: str, make_run: Callable[..., Run]
) -> None:
    record = registry_record(make_run("federated-dp"), STATED, "2026-11-29")
    record["deployment"][part][field] = value
    assert any(fault in each for each in faults(record))


def test_yaml_reads_back_what_was_written(make_run: Callable[..., Run]) -> None:
    hostile = Context(purpose='a: "b" # c\n- d', curator="x", curator_type="Industry", region="y", authors=("z",))
    record = registry_record(make_run("federated-dp"), hostile, "2026-11-29")
    assert yaml.safe_load(as_yaml(record)) == record


def test_what_is_not_stated_is_asked_for(make_run: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="purpose, curator, curator_type, region, authors"):
        registry_record(make_run("federated-dp"), Context(), "2026-11-29")
    with pytest.raises(ConfigError, match="promises no differential privacy"):
        registry_record(make_run("federated"), STATED, "2026-11-29")
    for changed in ({"sector": "Ships"}, {"curator_type": "Family"}):
        with pytest.raises(ConfigError, match=next(iter(changed))):
            registry_record(make_run("federated-dp"), dataclasses.replace(STATED, **changed), "2026-11-29")


def test_hazards_of_a_run_are_held_only_where_something_was_looked_at(make_run: Callable[..., Run]) -> None:
    found = {each.name: each.status for each in run_hazards(audit(make_run("federated-dp")))}
    assert found["Accounting"] == "not held"  # this run has no ledgers
    assert found["Implementation of the mechanism"] == "not assessed"
    assert found["Access control"] == "not assessed"
    assert "held" not in found.values()
