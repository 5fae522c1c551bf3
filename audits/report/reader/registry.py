"""A record for the OpenDP Deployments Registry (opendp/deployments-registry-data), of one run.

Its fields are those of schemas/deployments-schema.yaml at commit 057e5d81, which the tests hold a record against. What
a program cannot know is taken from ``[report.context]``; a field that stays unknown says "Not stated." The record is a
draft: its board approves it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from choral.audits.findings.claims import claim_of, sentence_parts
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.audits.findings.context import Context
    from choral.audits.findings.schema import Claim
    from choral.trainers.run_folder.run import Run

SECTORS = ("Technology", "Healthcare", "Education", "Government", "Energy", "Finance")
CURATORS = ("Government", "Industry", "Nonprofit")
_NOT_STATED = "Not stated."


def registry_record(run: Run, context: Context, made: str) -> dict[str, Any]:
    """The record as plain data. made: the day of publication, YYYY-MM-DD.

    Raises: ConfigError (the run promises nothing; the context lacks what tier 1 requires, or names another sector).
    """
    claim = _promise(run, context)
    info = run.info
    adversary, trust = sentence_parts(info)
    title = str(info.config.get("title") or info.config.get("task") or "model")
    basic = {
        "name": title,
        "data_curators": [{"data_curator_name": context.curator, "data_curator_type": context.curator_type}],
        "description": f"{info.parameters:,} parameters, {info.kind} training, {len(info.parties)} parties.",
        "intended_use": context.purpose,
        "data_product_type": "Machine learning model",
        "data_product_region": context.region,
        "publication_date": made,
    }
    if context.sector:
        basic["data_product_sector"] = context.sector
    federated = info.kind == "federated"
    deployment = {
        "basic": basic,
        "dp_variant": {
            "variant_name": "Approximate DP",
            "data_domain": f"{sum(info.parties.values()):,} records of {len(info.parties)} data owners.",
            "unprotected_quantities": "; ".join(claim.public) + ".",
        },
        "privacy_loss": {
            "privacy_unit": "Record-level" if claim.unit == "record" else "Client-level",
            "privacy_unit_details": f"Neighbouring datasets: {claim.neighbours}.",
            "number_of_privacy_units": sum(info.parties.values()) if claim.unit == "record" else info.party_count,
            "privacy_parameters": {"epsilon": round(claim.quoted, 6), "delta": claim.delta},
            "privacy_parameters_details": claim.sentence,
        },
        "deployment_model": {
            "model_name": "Federated" if federated else "Central",
            "model_name_details": f"{info.kind} training".capitalize() + _summed(info.secure_sum),
            "trust_assumptions": trust,
            "actors": f"Held off: {adversary}.",
            "release_type": "One release",
            "data_source_type": "Static",
            "access_type": "Non-interactive",
            "data_source_type_details": "The records that the run was started with.",
            "access_type_details": "The trained model is published; nobody queries the records.",
        },
        "implementation": {
            "preprocessing_and_hyperparameter_tuning": "Not covered by the guarantee, and not recorded.",
            "mechanisms": _mechanisms(run),
            "composition": f"{claim.accountant}, over all steps on a ledger of each data owner.",
            "post_processing": "None recorded.",
            "justification": context.justification or _NOT_STATED,
            "utility": _utility(run),
            "additional_information": "Made by Choral from a run folder; other releases: "
            + ("; ".join(context.releases) or "not stated") + ".",
        },
        "administrative": {"status": "Draft", "registry_authors": list(context.authors), "tier": 3},
    }  # fmt: skip
    slug = "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in title.lower()).split())[:60]
    return {"url_slug": slug or "model", "deployment": deployment}


def _promise(run: Run, context: Context) -> Claim:
    """What the run promises, if that can be registered. Raises: ConfigError."""
    claim = claim_of([run.info])
    if claim is None:
        raise ConfigError("the run promises no differential privacy: there is no deployment to register")
    missing = [
        name for name in ("purpose", "curator", "curator_type", "region", "authors") if not getattr(context, name)
    ]
    if missing:
        raise ConfigError(
            f"a record of the registry needs {', '.join(missing)}, which no program knows",
            hint="state them in the settings, table [report.context], or in a file given with --context",
        )
    if context.sector and context.sector not in SECTORS:
        raise ConfigError(f"sector is {context.sector!r}, expected one of {', '.join(SECTORS)}")
    if context.curator_type not in CURATORS:
        raise ConfigError(f"curator_type is {context.curator_type!r}, expected one of {', '.join(CURATORS)}")
    return claim


def _summed(secure_sum: Mapping[str, Any] | None) -> str:
    return f", updates added up by a {secure_sum.get('name')} sum." if secure_sum else "."


def _utility(run: Run) -> str:
    if not run.history:
        return _NOT_STATED
    shown = ", ".join(f"{name} {value:.4g}" for name, value in run.history[-1].metrics.items())
    return f"On the evaluation data, after the last round: {shown}."


def _mechanisms(run: Run) -> str:
    spent = next(iter(run.info.spent.values()))
    versions = ", ".join(f"{name} {version}" for name, version in run.info.versions.items())
    return (
        f"Gaussian mechanism, noise multiplier {spent.noise_multiplier:.4g}, sample rate {spent.sample_rate:.4g},"
        f" {spent.steps} steps for the first data owner. Noise and sums are integers on a grid, against floating-point"
        f" attacks; randomness from the operating system. Timing was not assessed. Versions: {versions}."
    )


def as_yaml(value: Mapping[str, Any], depth: int = 0) -> str:
    """Plain data as YAML, block style; strings are quoted as JSON quotes them, which YAML reads."""
    lines = []
    for key, item in value.items():
        lead = f"{'  ' * depth}{key}:"
        if isinstance(item, Mapping):
            lines.append(f"{lead}\n{as_yaml(item, depth + 1)}")
        elif isinstance(item, list):
            shown = (f"{'  ' * (depth + 1)}- {json.dumps(each, ensure_ascii=False)}" for each in item)
            lines.append("\n".join([lead, *shown]))
        else:
            lines.append(f"{lead} {_number(item) if isinstance(item, float) else json.dumps(item, ensure_ascii=False)}")
    return "\n".join(lines)


def _number(value: float) -> str:
    """With a point in it: YAML takes 1e-05 for a word."""
    shown = repr(value)
    return shown.replace("e", ".0e") if "e" in shown and "." not in shown else shown
