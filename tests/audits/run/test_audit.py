"""The audit of one run: real ledgers, real accounting, and every way in which a claim can fail."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from choral.audits import Audit, ReportError, audit
from choral.audits.findings.claims import no_claim
from choral.errors import ConfigError, DataError
from choral.privacy import Ledger, LedgerError, PoissonSampledGaussian, Spent
from choral.privacy.accounting.record_level import epsilon
from choral.trainers import Run, RunFolderError

MakeRun = Callable[..., Run]
DELTA = 1e-3
PROMISED = 8.0
RATES = {"north": 0.1, "south": 0.05, "o/west ": 0.05}
SIZES = {"north": 90, "south": 120, "o/west ": 60}  # a name that needs quoting on disk
FILES = {"north": "north", "south": "south", "o/west ": "o%2Fwest%20"}


def event(name: str, steps: int = 10) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=RATES[name], noise_multiplier=0.9, steps=steps)


def cost(name: str, events: int = 2) -> Spent:
    paid = [event(name)] * events
    return Spent(
        epsilon=epsilon(paid, DELTA), delta=DELTA, accountant="PLD", steps=10 * events, noise_multiplier=0.9,
        sample_rate=RATES[name],
    )  # fmt: skip


def write_ledger(folder: Path, name: str, events: int = 2) -> None:
    (folder / "ledger").mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "ledger" / f"{FILES[name]}.jsonl")
    ledger.bind(name, DELTA)
    for number in range(events):
        ledger.append(event(name), after=number)


@pytest.fixture
def private(make_run: MakeRun) -> Callable[..., Run]:
    """A private run of three parties that has spent what its ledgers will hold."""

    def make(**changes: object) -> Run:
        spent = {name: cost(name) for name in SIZES}
        promise = {"epsilon": PROMISED, "delta": DELTA, "max_grad_norm": 1.0, "epochs": 1}
        run = make_run("federated-dp", epsilon=max(each.epsilon for each in spent.values()) / 0.999, parties=SIZES)
        return make_run("federated-dp", history=run.history, **{
            "parties": SIZES, "spent": spent, "privacy": promise, **changes
        })  # fmt: skip

    return make


@pytest.fixture
def folder(private: Callable[..., Run], tmp_path: Path) -> Path:
    return _kept(private(), tmp_path / "run")


def _kept(run: Run, folder: Path, ledgers: dict[str, int] | None = None) -> Path:
    run.save(folder)
    for name, events in (ledgers or dict.fromkeys(SIZES, 2)).items():
        write_ledger(folder, name, events)
    return folder


def test_a_run_that_keeps_its_promise_holds(folder: Path) -> None:
    report = audit(folder)
    assert (report.verdict, report.exit_code) == ("holds", 0)
    for row in report.budgets:
        assert row.claimed == epsilon([event(row.holder)] * 2, DELTA)
        assert row.recomputed == pytest.approx(row.claimed, rel=1e-6)  # another implementation
        assert (row.promised, row.delta, row.steps) == (PROMISED, DELTA, 20)
    assert [row.holder for row in report.budgets] == list(SIZES)
    assert report.traces[0].name == "accuracy"
    assert len(report.traces[0].values) == 21
    assert "north" in report.claim or "west" in report.claim


def test_the_audit_of_a_folder_and_of_its_run_agree(folder: Path) -> None:
    by_run, by_path = audit(Run.load(folder)), audit(str(folder))
    assert msgspec.structs.replace(by_run, made="") == msgspec.structs.replace(by_path, made="")


def test_auditing_leaves_the_folder_as_it_was(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    audit(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_ledger_beyond_the_promise_violates(private: Callable[..., Run], tmp_path: Path) -> None:
    promise = {"epsilon": 0.5, "delta": DELTA, "max_grad_norm": 1.0, "epochs": 1}
    spent = {name: replace(cost(name), epsilon=0.4) for name in SIZES}
    report = audit(_kept(private(privacy=promise, spent=spent), tmp_path / "run"))
    assert (report.verdict, report.exit_code) == ("violated", 1)
    assert all(row.verdict == "violated" and "promised" in row.finding for row in report.budgets)


def test_a_claim_below_the_ledger_violates(private: Callable[..., Run], tmp_path: Path) -> None:
    spent = {name: cost(name) for name in SIZES}
    spent["south"] = replace(spent["south"], epsilon=spent["south"].epsilon * (1 - 1e-3))
    report = audit(_kept(private(spent=spent), tmp_path / "run"))
    assert [row.verdict for row in report.budgets] == ["holds", "violated", "holds"]
    assert report.verdict == "violated"


def test_a_claim_beyond_the_promise_violates_without_any_ledger(private: Callable[..., Run]) -> None:
    spent = {name: replace(cost(name), epsilon=PROMISED + 0.01) for name in SIZES}
    assert audit(private(spent=spent)).verdict == "violated"


def test_a_claim_at_a_larger_delta_violates(private: Callable[..., Run], tmp_path: Path) -> None:
    spent = {name: cost(name) for name in SIZES}
    spent["north"] = replace(spent["north"], delta=2e-3, epsilon=epsilon([event("north")] * 2, 2e-3))
    report = audit(_kept(private(spent=spent), tmp_path / "run"))
    assert report.budgets[0].verdict == "violated"
    assert "δ" in report.budgets[0].finding


@pytest.mark.parametrize("field", ["epsilon", "delta"])
def test_a_claim_that_is_no_number_is_refused(field: str, private: Callable[..., Run]) -> None:
    spent = {name: replace(cost(name), **{field: math.nan}) for name in SIZES}
    with pytest.raises(DataError, match=f"{field} spent by north is nan"):
        audit(private(spent=spent))
    promise = {"epsilon": PROMISED, "delta": DELTA, field: math.inf}
    with pytest.raises(DataError, match=f"promises {field} = inf"):
        audit(private(privacy=promise))


def test_a_missing_ledger_is_not_a_pass(folder: Path) -> None:
    (folder / "ledger" / "south.jsonl").unlink()
    report = audit(folder)
    assert (report.verdict, report.exit_code) == ("unverified", 1)
    assert [row.recomputed is None for row in report.budgets] == [False, True, False]


def test_a_run_in_memory_has_no_ledger(private: Callable[..., Run]) -> None:
    report = audit(private())
    assert (report.verdict, report.exit_code) == ("unverified", 1)


def test_a_ledger_that_lost_its_last_events_is_not_a_pass(private: Callable[..., Run], tmp_path: Path) -> None:
    # A chain stays whole when its end is cut off, and then costs less than was claimed.
    report = audit(_kept(private(), tmp_path / "run", {"north": 2, "south": 1, "o/west ": 2}))
    assert [row.verdict for row in report.budgets] == ["holds", "unverified", "holds"]
    assert "10 steps" in report.budgets[1].finding
    assert report.exit_code == 1


def test_a_party_without_any_claim_is_not_a_pass(private: Callable[..., Run], tmp_path: Path) -> None:
    spent = {name: cost(name) for name in SIZES if name != "north"}
    report = audit(_kept(private(spent=spent), tmp_path / "run"))
    assert report.budgets[0].verdict == "violated"  # finished, with steps on its ledger, and nothing claimed
    other = _kept(private(spent=spent), tmp_path / "other", {"south": 2, "o/west ": 2})
    assert audit(other).budgets[0].verdict == "unverified"


def test_an_interrupted_round_may_be_on_the_ledger_already(private: Callable[..., Run], tmp_path: Path) -> None:
    # The ledger is written before the noise is used: after a crash it is ahead of run.json, and right.
    run = replace(private(), history=private().history[:5])
    report = audit(_kept(run, tmp_path / "run", dict.fromkeys(SIZES, 3)))
    assert report.verdict == "holds"
    assert report.run is not None
    assert report.run.completed == 4
    assert "cut short" in report.budgets[0].finding
    assert audit(_kept(private(), tmp_path / "done", dict.fromkeys(SIZES, 3))).verdict == "violated"


def test_an_edited_ledger_is_an_error(folder: Path) -> None:
    path = folder / "ledger" / "north.jsonl"
    path.write_text(path.read_text().replace('"steps":10', '"steps":1', 1))
    with pytest.raises(LedgerError, match="north"):
        audit(folder)


def test_a_ledger_of_another_holder_is_an_error(folder: Path) -> None:
    (folder / "ledger" / "north.jsonl").write_bytes((folder / "ledger" / "south.jsonl").read_bytes())
    with pytest.raises(LedgerError, match="belongs to 'south'"):
        audit(folder)


def test_an_edited_claim_is_found(folder: Path) -> None:
    held = json.loads((folder / "run.json").read_text())
    held["spent"]["north"]["epsilon"] = 0.1
    (folder / "run.json").write_text(json.dumps(held))
    assert audit(folder).verdict == "violated"


def test_a_removed_promise_is_found(folder: Path) -> None:
    held = json.loads((folder / "run.json").read_text())
    held["privacy"], held["spent"] = None, {}
    (folder / "run.json").write_text(json.dumps(held))
    report = audit(folder)
    assert (report.verdict, report.exit_code) == ("unverified", 1)


def test_a_history_above_the_claim_violates(private: Callable[..., Run], tmp_path: Path) -> None:
    history = list(private().history)
    history[9] = msgspec.structs.replace(history[9], epsilon=9.5)
    report = audit(_kept(replace(private(), history=tuple(history)), tmp_path / "run"))
    check = next(check for check in report.checks if "history" in check.name)
    assert (check.verdict, report.verdict) == ("violated", "violated")


def test_a_delta_of_one_over_n_is_no_promise(private: Callable[..., Run], tmp_path: Path) -> None:
    sizes = {"north": 90, "south": 1000, "o/west ": 60}
    report = audit(_kept(private(parties=sizes), tmp_path / "run"))
    check = next(check for check in report.checks if "1/n" in check.name)
    assert check.verdict == "violated"
    assert "1000" in check.finding


@pytest.mark.parametrize(
    ("arm", "said"),
    [("cloud", "cloud holds the raw data"), ("federated", "in the clear"), ("federated-masked", "hides")],
)
def test_a_run_without_privacy_says_what_it_hides(arm: str, said: str, make_run: MakeRun) -> None:
    report = audit(make_run(arm))
    assert report.claim.startswith("No differential privacy is promised")
    assert said in report.claim
    assert (report.verdict, report.exit_code, report.budgets) == ("holds", 0, ())


@pytest.mark.parametrize(("key", "said"), [("split", "and the other parties"), ("shared", "no party gives the key to")])
def test_it_says_from_whom_a_ciphertext_hides(key: str, said: str) -> None:
    claim = no_claim("federated", {"name": "homomorphic", "key": key})
    assert f"{said}, under the trust it states" in claim


def test_a_claim_says_how_the_cohorts_were_made() -> None:
    stated = {"name": "masked", "corrupt": 21, "directory": 1000}
    assert "semi-honest in the choice of the cohort" in no_claim("federated", stated | {"cohort": "random"})
    assert "and withstands 21 colluders in it" in no_claim("federated", stated | {"cohort": "chosen"})
    for whole in (stated | {"cohort": "everyone"}, stated):
        assert "cohort" not in no_claim("federated", whole)


def test_every_attack_is_named_as_not_run(folder: Path) -> None:
    names = " ".join(each.name for each in audit(folder).not_run)
    for attack in ("Membership", "LiRA", "RMIA", "canaries", "inversion", "Transcript"):
        assert attack in names


def test_a_damaged_folder_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        audit(tmp_path / "nowhere")
    (folder / "history.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"history\.jsonl"):
        audit(folder)


def test_a_run_without_history_or_with_nan_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="no history"):
        audit(replace(make_run(), history=()))
    history = list(make_run().history)
    history[2] = msgspec.structs.replace(history[2], metrics={"accuracy": math.nan})
    with pytest.raises(DataError, match="after round 2"):
        audit(replace(make_run(), history=tuple(history)))


def test_json_round_trip(folder: Path, tmp_path: Path) -> None:
    report = audit(folder)
    path = report.save(tmp_path / "audit.json")
    assert Audit.load(path) == report
    held = json.loads(path.read_text())
    assert (held["format"], held["version"], held["kind"], held["verdict"]) == ("choral-report", 2, "audit", "holds")
    path.write_text(json.dumps({**held, "verdict": "fine"}))
    with pytest.raises(ReportError, match="fine"):
        Audit.load(path)


def test_it_prints(folder: Path) -> None:
    (folder / "ledger" / "south.jsonl").unlink()
    out = io.StringIO()
    audit(folder).print(Console(file=out, width=80))
    printed = out.getvalue()
    assert "unverified" in printed
    assert "south" in printed
    assert "Not audited" in printed
    assert max(map(len, printed.splitlines())) <= 80
