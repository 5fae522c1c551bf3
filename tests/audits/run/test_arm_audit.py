"""Evidence inside the comparison: every run audited, edited ledgers found, attacks held against their own arm."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flat_arguments import centralize, federate
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Privacy, audit
from choral.audits import ArmEvidence, Comparison, compare
from choral.audits.report.html import comparison_page
from choral.audits.report.markdown import comparison_markdown
from choral.errors import ConfigError
from choral.privacy import Ledger, LedgerError
from choral.privacy.accounting import record_level
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.trainers import Run

Arms = dict[str, list[Run]]
PROMISE = Privacy(epsilon=3.0, delta=1e-4, max_grad_norm=1.0, epochs=1)


def build(dataset):
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)


def fit(model, optimizer, loader):
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def job():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(150, 4, generator=generator)
    labels = (points[:, 0] > 0).long()
    parties = {name: TensorDataset(points[n::3], labels[n::3]) for n, name in enumerate(("north", "south", "east"))}
    return {
        "build": build,
        "fit": fit,
        "evaluate": lambda model: float((model(points).argmax(1) == labels).double().mean()),
        "parties": parties,
        "rounds": 2,
    }


@pytest.fixture(scope="module")
def trained(job, tmp_path_factory) -> Path:
    """Two seeds of a private federation, and the pooled data without privacy."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        centralize(**job, seed=seed, out=folder / f"cloud-{seed}")
        federate(**job, seed=seed, privacy=PROMISE, secure_sum=Masked(min_survivors=2), out=folder / f"dp-{seed}")
    return folder


@pytest.fixture
def real(trained: Path, tmp_path: Path) -> Arms:
    """Copies of them, to be spoilt."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    named = {"cloud": "cloud", "federated-dp": "dp"}
    return {arm: [Run.load(tmp_path / f"{name}-{seed}") for seed in (0, 1)] for arm, name in named.items()}


def found_on(report: Comparison, arm: str):
    return next(each.audit for each in report.arms if each.name == arm)


def test_every_run_is_audited_as_the_audit_does(real: Arms) -> None:
    report = compare(real)
    found = found_on(report, "federated-dp")
    alone = [audit(run) for run in real["federated-dp"]]
    assert (found.verdict, found.runs, report.exit_code) == ("holds", 2, 0)
    assert [check.name for check in found.checks] == [check.name for check in alone[0].checks]
    for check, first in zip(found.checks, alone[0].checks, strict=True):
        assert check.finding == f"2 of 2 runs. Seed 0: {first.finding}"
    assert found.not_run == alone[0].not_run == report.not_run
    assert "No attack was run" in found.sentence
    assert "No differential privacy is promised" in found_on(report, "cloud").sentence


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


def spoil_chain(folder: Path) -> None:
    ledger = folder / "ledger" / "south.jsonl"
    edit(ledger, '"noise_multiplier":', '"noise_multiplier":9')


def spoil_claim(folder: Path) -> None:
    path = folder / "run.json"
    content = json.loads(path.read_text())
    content["spent"]["south"]["epsilon"] /= 2
    path.write_text(json.dumps(content))


def spoil_unit(folder: Path) -> None:
    edit(folder / "run.json", '"unit": "record"', '"unit": "client"')


def spoil_neighbours(folder: Path) -> None:
    edit(folder / "run.json", "zero out one record", "replace all records")


@pytest.mark.parametrize("spoil", [spoil_chain, spoil_claim, spoil_unit, spoil_neighbours])
def test_an_edited_ledger_or_claim_makes_its_arm_violated_and_no_other(
    real: Arms, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path / "dp-1")
    report = compare({**real, "federated-dp": [real["federated-dp"][0], Run.load(tmp_path / "dp-1")]})
    assert found_on(report, "federated-dp").verdict == "violated"
    assert found_on(report, "cloud").verdict == "holds"
    assert report.exit_code == 1
    faulty = [check for check in found_on(report, "federated-dp").checks if check.verdict == "violated"]
    assert "1 of 2 runs. Seed 1: " in faulty[0].finding
    assert any(check.verdict == "violated" and "within its budget" in check.name for check in report.checks)
    console = Console(file=io.StringIO(), width=300)
    report.print(console)
    for form in (comparison_page(report), comparison_markdown(report), console.file.getvalue()):
        assert "violated" in form.lower()
        assert str(tmp_path) not in form
    assert str(tmp_path) not in (report.save(tmp_path / "report.json")).read_text()
    assert Comparison.load(tmp_path / "report.json") == report


def test_a_holder_left_out_of_run_json_is_found_by_its_ledger(real: Arms, tmp_path: Path) -> None:
    path = tmp_path / "dp-1" / "run.json"
    content = json.loads(path.read_text())
    del content["spent"]["south"], content["parties"]["south"]
    path.write_text(json.dumps(content))
    found = audit(tmp_path / "dp-1")
    assert (found.verdict, found.exit_code) == ("violated", 1)  # more survivors than run.json has parties left
    assert "south.jsonl" in next(check.finding for check in found.checks if check.verdict == "unverified")


def test_alone_such_a_run_is_refused_by_the_audit(real: Arms, tmp_path: Path) -> None:
    spoil_chain(tmp_path / "dp-1")
    with pytest.raises(LedgerError):
        audit(tmp_path / "dp-1")


def test_without_its_ledgers_an_arm_is_not_verified_which_is_no_pass(arms: Arms) -> None:
    report = compare(arms)
    assert found_on(report, "federated-dp").verdict == "unverified"
    assert found_on(report, "cloud").verdict == "holds"
    assert report.exit_code == 1


def test_a_transcript_that_is_gone_leaves_the_arm_unverified_as_it_does_its_run(job, tmp_path: Path) -> None:
    runs = [
        federate(**job, seed=seed, secure_sum=Masked(min_survivors=2), transcript="digests", out=tmp_path / str(seed))
        for seed in (0, 1)
    ]
    assert found_on(compare({"federated": runs}), "federated").verdict == "holds"
    shutil.rmtree(tmp_path / "1" / "transcript")
    report = compare({"federated": runs})
    found = found_on(report, "federated")
    assert audit(tmp_path / "1").verdict == found.verdict == "unverified"
    assert report.exit_code == 1
    faulty = next(check for check in found.checks if check.verdict == "unverified")
    assert "1 of 2 runs. Seed 1: " in faulty.finding
    assert "not in the run's folder" in faulty.finding


def test_an_arm_that_fails_otherwise_is_not_said_to_have_been_attacked(
    real: Arms, tmp_path: Path, evidence: SimpleNamespace
) -> None:
    shutil.rmtree(tmp_path / "dp-0" / "ledger")
    tried = {"cloud": [evidence.attack("no claim", claimed=None)]}
    page = comparison_page(compare(real, evidence=ArmEvidence(attacks=tried)))
    assert "<small>not tried</small>" in page
    assert "<small>failed</small>" not in page
    spoil_claim(tmp_path / "dp-1")
    real["federated-dp"][1] = Run.load(tmp_path / "dp-1")
    report = compare(real, evidence=ArmEvidence(attacks=tried, failed={"federated-dp": "The records are texts."}))
    assert found_on(report, "federated-dp").verdict == "violated"
    assert "<small>failed</small>" in comparison_page(report)


def test_attacks_and_probes_stand_by_their_arm(real: Arms, evidence: SimpleNamespace) -> None:
    report = compare(
        real,
        evidence=ArmEvidence(
            attacks={"cloud": [evidence.attack("no claim", claimed=None)], "federated-dp": [evidence.attack()]},
            probes={"federated-dp": evidence.probe(violated=False)},
        ),
    )
    assert report.exit_code == 0
    assert "at least ε\u00a0=\u00a00.40" in found_on(report, "cloud").sentence
    names = [entry.name for entry in report.not_run]
    assert "One-run audit with canaries" not in names
    assert "Gradient inversion" in names
    page = comparison_page(report)
    assert "canaries attacked 2 of 2 configurations" in page
    assert "≥ 0.40" in page
    assert "This report holds no attack" not in page


def test_an_attack_on_some_arms_leaves_the_others_listed_as_not_tried(real: Arms, evidence: SimpleNamespace) -> None:
    report = compare(real, evidence=ArmEvidence(attacks={"federated-dp": [evidence.attack()]}))
    assert "One-run audit with canaries" in [entry.name for entry in found_on(report, "cloud").not_run]
    assert "not tried" in comparison_page(report)
    assert "canaries attacked 1 of 2 configurations" in comparison_page(report)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (lambda make: {"attacks": {"federated-dp": [make.attack("violated")]}}, "violated"),
        (lambda make: {"attacks": {"federated-dp": [make.attack(null_holds=False)]}}, "unverified"),
        (lambda make: {"probes": {"federated-dp": make.probe(violated=True)}}, "violated"),
        (lambda make: {"failed": {"federated-dp": "The records are texts."}}, "unverified"),
    ],
)
def test_evidence_against_an_arm_decides_its_verdict_and_the_exit_code(
    real: Arms, evidence: SimpleNamespace, given: Callable, verdict: str
) -> None:
    report = compare(real, evidence=ArmEvidence(**given(evidence)))
    assert found_on(report, "federated-dp").verdict == verdict
    assert report.exit_code == 1
    assert comparison_page(report)
    assert comparison_markdown(report)


def test_evidence_on_no_arm_is_refused(real: Arms, evidence: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="evidence on 'clowd', which is no arm"):
        compare(real, evidence=ArmEvidence(attacks={"clowd": [evidence.attack()]}))


def test_a_violated_check_between_the_arms_is_no_pass_either(real: Arms, job) -> None:
    fewer = dict(list(job["parties"].items())[:2])
    report = compare({"cloud": real["cloud"], "less": [centralize(**(job | {"parties": fewer}), seed=0)]})
    assert all(arm.audit.verdict == "holds" for arm in report.arms)
    assert [check.verdict for check in report.checks if "number of examples" in check.name] == ["violated"]
    assert report.exit_code == 1


def reworded(ledger: Path) -> None:
    """The ledger as earlier versions worded its header, its chain of hashes whole."""
    entries = [json.loads(line)["entry"] for line in ledger.read_text(encoding="utf-8").splitlines()]
    entries[0]["neighbours"] = "add or remove one record"
    ledger.write_bytes(lines(GENESIS, entries)[0])


def test_a_run_in_older_words_holds_and_its_claim_reads_as_zero_out(real: Arms, tmp_path: Path) -> None:
    folder = tmp_path / "dp-0"
    for ledger in (folder / "ledger").iterdir():
        reworded(ledger)
    written = (folder / "run.json").read_text(encoding="utf-8").replace("zero out one", "add or remove one")
    (folder / "run.json").write_text(written, encoding="utf-8")
    (folder / "manifest.json").unlink(missing_ok=True)  # as then
    shutil.rmtree(folder / "receipts", ignore_errors=True)
    found = audit(Run.load(folder))
    assert found.verdict == "holds"
    assert "zero out one record (in older words: add or remove one record)" in found.claim
    assert all("in older words" in row.finding for row in found.budgets)
    assert any("older words" in check.finding for check in found.checks)
    assert (folder / "run.json").read_text(encoding="utf-8") == written
    # A relation that the ledger does not have is no wording.
    edit(folder / "run.json", "add or remove one record", "zero out one client")
    assert audit(Run.load(folder)).verdict == "violated"


def test_a_run_where_records_are_replaced_is_recomputed_and_claimed_so(job, tmp_path: Path) -> None:
    promise = replace(PROMISE, ledger=None, neighbours="replace one record", records_per_person=2)
    run = federate(**job, privacy=promise, secure_sum=Masked(min_survivors=2), out=tmp_path / "run")
    zero_out = federate(**job, privacy=replace(PROMISE, ledger=None), secure_sum=Masked(min_survivors=2))
    found = audit(run)
    assert found.verdict == "holds"
    assert "“replace one record” (one record is replaced by any other)" in found.claim
    assert "how many records each data owner has" in found.claim
    assert re.search(r"For a person with up to 2 records, it is \(ε\s=\s(5\.9|6\.0)", found.claim)
    assert all(row.recomputed == pytest.approx(row.claimed, rel=1e-3) for row in found.budgets)
    assert run.info.spent["south"].noise_multiplier > 1.05 * zero_out.info.spent["south"].noise_multiplier
    # By the ledger's events alone, as for records zeroed out, the cost would look smaller.
    assert zero_out_cost(tmp_path / "run" / "ledger" / "south.jsonl") < 0.95 * run.info.spent["south"].epsilon
    path = tmp_path / "run" / "run.json"
    written = path.read_text(encoding="utf-8")
    parts = written.split("replace one record")
    assert len(parts) == 5  # the promise, and the cost of three data owners
    for place in range(1, len(parts)):  # one of them edited
        halves = ["replace one record".join(each) for each in (parts[:place], parts[place:])]
        path.write_text("zero out one record".join(halves), encoding="utf-8")
        assert audit(Run.load(tmp_path / "run")).verdict == "violated"


def zero_out_cost(ledger: Path) -> float:
    return record_level.epsilon(Ledger(ledger).events, 1e-4)
