"""The one report object: evidence in it, its schema, its Markdown, and the verdict in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import msgspec
import pytest

from choral.audits import Audit, ReportError, audit, compare
from choral.audits.findings.verdict import not_run
from choral.audits.report_schema import json_schema
from choral.audits.run.run_audit import audit_evidence
from choral.errors import ConfigError
from choral.trainers import Run

MakeRun = Callable[..., Run]
ROOT = Path(__file__).resolve().parents[3]
HOSTILE = '"><script>alert(1)</script>|**x**<img src=x>'


def test_evidence_turns_into_checks_and_a_verdict(make_run: MakeRun, evidence: SimpleNamespace) -> None:
    run = make_run("federated")
    fine = audit(run, attacks=[evidence.attack()], probe=evidence.probe(violated=False), inversion=evidence.inversion())
    assert (fine.verdict, fine.exit_code) == ("holds", 0)
    assert "could have detected up to ε\u00a0=\u00a03.70" in fine.sentence
    for report in (
        audit(run, attacks=[evidence.attack("violated")]),
        audit(run, probe=evidence.probe(violated=True)),
        audit(run, inversion=evidence.inversion(recovered=True)),
    ):
        assert (report.verdict, report.exit_code) == ("violated", 1)
        assert report.sentence.startswith("Violated")
    assert "at 95\u00a0% confidence" in audit(run, attacks=[evidence.attack("violated")]).sentence


def test_a_test_that_fails_its_own_null_control_proves_nothing(make_run: MakeRun, evidence: SimpleNamespace) -> None:
    report = audit(make_run(), attacks=[evidence.attack("violated", null_holds=False)])
    assert report.verdict == "unverified"
    assert "200 of 500" in report.checks[-1].finding


def test_without_an_attack_the_verdict_says_so(make_run: MakeRun) -> None:
    assert "No attack was run" in audit(make_run()).sentence


def test_what_was_run_is_off_the_list(evidence: SimpleNamespace) -> None:
    names = [entry.name for entry in not_run([evidence.attack()], None, evidence.inversion(), None)]
    assert names == ["LiRA (likelihood-ratio attack)", "RMIA (robust membership inference)", "Transcript audit"]
    assert len(not_run([], None, None, None)) == 6


def test_a_model_from_elsewhere_has_a_report_too(tmp_path: Path, evidence: SimpleNamespace) -> None:
    report = audit_evidence("My model", attacks=[evidence.attack()])
    assert report.run is None
    assert "claimed to be (ε\u00a0=\u00a03" in report.claim
    assert "no ledger backs it" in report.claim
    assert Audit.load(report.save(tmp_path / "r.json")) == report
    words = report.save(tmp_path / "r.html").read_text("utf-8")
    for needed in ("one-run", "Ceiling", "null control", "95 %", "Few canaries", "fair coin"):
        assert needed in words, needed
    with pytest.raises(ConfigError, match="nothing to report"):
        audit_evidence("Nothing")


def reports(make_run: MakeRun, evidence: SimpleNamespace) -> dict[str, Any]:
    arms = {"cloud": make_run("cloud"), "federated-dp": make_run("federated-dp")}
    return {
        "audit": audit(
            make_run("federated"),
            attacks=[evidence.attack()],
            probe=evidence.probe(violated=False),
            inversion=evidence.inversion(),
        ),
        "evidence": audit_evidence("My model", attacks=[evidence.attack()]),
        "comparison": compare(arms),
    }


def test_the_schema_accepts_every_report_and_refuses_others(make_run: MakeRun, evidence: SimpleNamespace) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for report in reports(make_run, evidence).values():
        held = json.loads(msgspec.json.encode(report))
        validator.validate(held)
        for broken in ({**held, "verdict": 3, "baseline": 3}, {**held, "extra": 1}, {**held, "made": None}):
            with pytest.raises(jsonschema.ValidationError):
                validator.validate(broken)


def test_the_published_schema_is_that_of_the_code() -> None:
    def ordered(schema: Any) -> Any:
        """Alternatives in one order: versions of msgspec list them in different ones."""
        if isinstance(schema, dict):
            return {name: ordered(value) for name, value in schema.items()}
        if isinstance(schema, list):
            return sorted(map(ordered, schema), key=lambda part: json.dumps(part, sort_keys=True))
        return schema

    published = json.loads((ROOT / "docs" / "report.schema.json").read_text("utf-8"))
    assert ordered(published) == ordered(json_schema()), "choral audit --schema > docs/report.schema.json"


def test_a_report_of_another_version_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    path = audit(make_run()).save(tmp_path / "r.json")
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ReportError, match="of report version 1; this Choral reads 2"):
        Audit.load(path)


def test_a_report_that_could_not_be_read_back_is_not_written(tmp_path: Path, evidence: SimpleNamespace) -> None:
    report = audit_evidence("My model", attacks=[evidence.attack()])
    attack = msgspec.structs.replace(report.attacks[0], delta=float("nan"))
    broken = msgspec.structs.replace(report, attacks=(attack,))
    with pytest.raises(ReportError, match="cannot be written as JSON"):
        broken.save(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_markdown_for_a_model_card(make_run: MakeRun, tmp_path: Path, evidence: SimpleNamespace) -> None:
    found = {
        name: report.save(tmp_path / f"{name}.md").read_text() for name, report in reports(make_run, evidence).items()
    }
    assert "**No violation found; the strongest test" in found["audit"]
    assert "| one-run | 0.4 | 3.7 |  | 10⁻⁵ | 95 % (confidence) |" in found["audit"]
    assert "What was not audited" in found["audit"]
    assert "| federated-dp |" in found["comparison"]
    assert "differentially private for each record" in found["comparison"]
    for text in found.values():
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            assert len({line.count("|") - line.count(r"\|") for line in table.splitlines()}) == 1


def test_markdown_escapes_what_users_name(make_run: MakeRun, tmp_path: Path) -> None:
    text = compare({HOSTILE: make_run()}, title=HOSTILE).save(tmp_path / "r.md").read_text()
    assert "<script" not in text.replace(r"\<", "")
    assert r"\|\*\*x\*\*" in text
    lines = [f"one{end}# two" for end in ("\n", "\r", "\r\n")]
    text = compare(dict.fromkeys(lines, make_run()), title=lines[1]).save(tmp_path / "r.md").read_bytes().decode()
    assert "\r" not in text
    assert text.startswith("## one \\# two\n")


def test_a_bound_under_assumptions_above_the_claim_is_pointed_out(evidence: SimpleNamespace) -> None:
    strict = evidence.attack().bounds[0]
    assumed = msgspec.structs.replace(strict, method="one run, Gaussian f-DP", epsilon=3.5)
    report = audit_evidence("My model", attacks=[evidence.attack(bounds=(strict, assumed))])
    assert report.verdict == "holds"
    assert "further assumptions are above the claim (one run, Gaussian f-DP: 3.5)" in report.checks[0].finding


def test_a_claim_that_no_attack_could_have_refuted_is_called_so(evidence: SimpleNamespace) -> None:
    beyond = audit_evidence("My model", attacks=[evidence.attack(claimed=8.0)])
    assert "is not below that: no attack here could have refuted it" in beyond.sentence
    assert "refuted" not in audit_evidence("My model", attacks=[evidence.attack(claimed=3.0)]).sentence
    probed = audit_evidence("My model", probe=evidence.probe(violated=False))
    assert "could have detected up to" in probed.sentence
