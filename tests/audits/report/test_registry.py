"""A record for the OpenDP Deployments Registry has the registry's fields, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from choral.audits import audit
from choral.audits.findings.context import Context
from choral.audits.report.reader.hazards import run_hazards
from choral.audits.report.reader.registry import as_yaml, registry_record
from choral.errors import ConfigError
from choral.trainers import Run

STATED = Context(
    purpose="Triage", curator="Three hospitals", region="Switzerland", sector="Healthcare", authors=("A. Bee",)
)
# As in tests/good_deployments/template.yaml of opendp/deployments-registry-data, whose schema allows no other keys.
FIELDS: dict[str, set[str]] = {
    "basic": {
        "name", "data_curators", "description", "intended_use", "data_product_type", "data_product_region",
        "data_product_sector", "publication_date",
    },
    "dp_variant": {"variant_name", "data_domain", "unprotected_quantities"},
    "privacy_loss": {
        "privacy_unit", "privacy_unit_details", "number_of_privacy_units", "privacy_parameters",
        "privacy_parameters_details",
    },
    "deployment_model": {
        "model_name", "model_name_details", "trust_assumptions", "actors", "release_type", "release_type_details",
        "data_source_type", "data_source_type_details", "access_type", "access_type_details",
    },
    "implementation": {
        "preprocessing_and_hyperparameter_tuning", "mechanisms", "composition", "post_processing", "justification",
        "utility", "additional_information",
    },
    "administrative": {"evidence_sources", "status", "registry_authors", "tier"},
}  # fmt: skip


def test_a_record_has_the_registrys_fields(make_run: Callable[..., Run]) -> None:
    record = registry_record(make_run("federated-dp"), STATED, "2026-11-29")
    assert set(record) == {"url_slug", "deployment"}
    deployment: dict[str, Any] = record["deployment"]
    assert set(deployment) == set(FIELDS)
    for part, fields in FIELDS.items():
        assert set(deployment[part]) <= fields, part
    assert deployment["deployment_model"]["model_name"] == "Federated"
    assert deployment["privacy_loss"]["privacy_parameters"] == {"epsilon": pytest.approx(7.992), "delta": 1e-5}
    assert deployment["administrative"]["status"] == "Draft"
    assert "complies" not in str(record)


def test_yaml_reads_back_what_was_written(make_run: Callable[..., Run]) -> None:
    hostile = Context(purpose='a: "b" # c\n- d', curator="x", region="y", authors=("z",))
    record = registry_record(make_run("federated-dp"), hostile, "2026-11-29")
    assert yaml.safe_load(as_yaml(record)) == record


def test_what_is_not_stated_is_asked_for(make_run: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="purpose, curator, region, authors"):
        registry_record(make_run("federated-dp"), Context(), "2026-11-29")
    with pytest.raises(ConfigError, match="promises no differential privacy"):
        registry_record(make_run("federated"), STATED, "2026-11-29")
    with pytest.raises(ConfigError, match="sector"):
        registry_record(make_run("federated-dp"), Context(purpose="a", curator="b", region="c", sector="Ships",
                                                          authors=("d",)), "2026-11-29")  # fmt: skip


def test_hazards_of_a_run_are_held_only_where_something_was_looked_at(make_run: Callable[..., Run]) -> None:
    found = {each.name: each.status for each in run_hazards(audit(make_run("federated-dp")))}
    assert found["Accounting"] == "not held"  # this run has no ledgers
    assert found["Implementation of the mechanism"] == "not assessed"
    assert found["Access control"] == "not assessed"
    assert "held" not in found.values()
