"""Evidence in a comparison: what ``choral audit`` finds in each run of an arm, and the attacks that were made on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from choral.audits.budgets.accountants import accountants_check, accountants_of
from choral.audits.budgets.budgets import budget_checks, of_run, owner_budgets, unverifiable
from choral.audits.budgets.consistency import books_checks
from choral.audits.budgets.parameters import parameters_of
from choral.audits.budgets.participation import participation_checks, participation_of
from choral.audits.findings.evidence import Probe, ScoreAudit
from choral.audits.findings.parameters import PromiseParameters
from choral.audits.findings.schema import ArmAudit, Check, OwnerBudget
from choral.audits.findings.text import at_least
from choral.audits.findings.verdict import FAILED, evidence_checks, not_run, verdict_sentence, worst
from choral.audits.run.signed_checks import UNBOUND, cited_manifest, signed_checks
from choral.audits.transcripts.transcript_audit import CHAINED, TranscriptAudit, transcript_audit, transcript_gone
from choral.errors import ChoralError

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

Rows = Callable[["Run"], tuple[OwnerBudget, ...]]


def ledger_rows() -> Rows:
    """A function from a run to its data owners' budgets, which reads and recomputes each run's ledgers once.

    Ledgers that do not verify make a row that is violated, instead of an error: the other arms are reported.
    """
    known: dict[int, tuple[OwnerBudget, ...]] = {}

    def rows(run: Run) -> tuple[OwnerBudget, ...]:
        if id(run) not in known:
            try:
                known[id(run)] = owner_budgets(run)
            except Exception as error:  # whatever is wrong with one run's ledgers, the others' are read
                known[id(run)] = (unverifiable(run, error),)
        return known[id(run)]

    return rows


def arm_audit(
    runs: Sequence[Run],
    rows: Rows,
    *,
    attacks: Sequence[ScoreAudit] = (),
    probe: Probe | None = None,
    failed: str = "",
) -> ArmAudit:
    """All runs of one arm, by what they left behind, and the attacks on a training of the same settings.

    failed: why an attack that was asked for could not be carried out.
    """
    found = [_books(run, rows(run)) for run in runs]
    checks = [
        *_merged([(run.info.seed, run_checks) for run, (run_checks, _) in zip(runs, found, strict=True)]),
        *evidence_checks(attacks, probe, None),
    ]
    if failed:
        checks.append(Check(name=FAILED, verdict="unverified", finding=failed))
    verdict = worst(checks)
    transcript = next((each for _, each in found if each is not None), None)
    if runs[0].info.privacy is None and verdict == "holds":
        sentence = _nothing_promised(attacks)
    else:
        sentence = verdict_sentence(verdict, checks, [*attacks, *([probe.canaries] if probe else [])])
    return ArmAudit(
        verdict=verdict,
        sentence=sentence,
        runs=len(runs),
        checks=tuple(checks),
        attacks=tuple(attacks),
        probe=probe,
        parameters=_parameters(runs),
        not_run=(
            *not_run(attacks, probe, None, transcript),
            *([] if all(cited_manifest(run) for run in runs) else [UNBOUND]),
        ),
    )


def _parameters(runs: Sequence[Run]) -> PromiseParameters | None:
    """Of the first seed, whose ledgers may be damaged: then a check says so."""
    try:
        return parameters_of(runs[0])
    except ChoralError:
        return None


def audited(
    runs: Sequence[Run],
    rows: Rows,
    *,
    attacks: Sequence[ScoreAudit] = (),
    probe: Probe | None = None,
    failed: str = "",
) -> ArmAudit:
    """The same, and of an audit that breaks off a verdict all the same: the arm is unverified, others are reported."""
    try:
        return arm_audit(runs, rows, attacks=attacks, probe=probe, failed=failed)
    except Exception as error:  # a damaged file of any kind, or a defect here: never the end of the comparison
        said = next((of_run(run, error) for run in runs if str(run.folder) in str(error)), of_run(runs[0], error))
        check = Check(name="The audit was carried out", verdict="unverified", finding=f"{said}.")
        return ArmAudit(
            verdict="unverified",
            sentence="The audit of this configuration broke off, so nothing is known of what it claims.",
            runs=len(runs),
            checks=(check, *evidence_checks(attacks, probe, None)),
            attacks=tuple(attacks),
            probe=probe,
            not_run=not_run(attacks, probe, None, None),
        )


def _nothing_promised(attacks: Sequence[ScoreAudit]) -> str:
    said = "No differential privacy is promised; of what else is claimed, nothing was found violated."
    for attack in attacks:
        bound = next((each for each in attack.bounds if each.method == attack.decisive), None)
        if bound is not None:
            said += (
                f" By an attack ({attack.attack}), the training costs at least ε\u00a0=\u00a0"
                f"{at_least(bound.epsilon, 2)} for each {attack.unit};"
                f" at most {bound.ceiling:.2f} could have been shown."
            )
    return said


def _books(run: Run, rows: tuple[OwnerBudget, ...]) -> tuple[list[Check], TranscriptAudit | None]:
    """What ``audit`` checks in the run; of a run whose ledgers do not verify, all that does not need them."""
    from choral.privacy import LedgerError
    from choral.trainers.run_folder.info import RunFolderError

    checks = list(budget_checks(run, rows))
    transcript: TranscriptAudit | None = None
    try:
        transcript = transcript_audit(run)
    except RunFolderError as error:
        checks.append(Check(name=CHAINED, verdict="violated", finding=f"{of_run(run, error)}."))
    else:
        checks += transcript_gone(run) if transcript is None else transcript.checks
    try:
        checks += books_checks(run)
        checks += signed_checks(run)
        checks += accountants_check(accountants_of(run))
        checks += participation_checks(run, participation_of(run))
    except LedgerError:
        if not any(row.verdict == "violated" for row in rows):
            raise
    return checks, transcript


def _merged(found: Sequence[tuple[int, list[Check]]]) -> list[Check]:
    """One check of each name over all seeds: the worst verdict, with what was found at the first seed that has it."""
    order: tuple[str, ...] = ("violated", "unverified", "holds")
    names = dict.fromkeys(check.name for _, checks in found for check in checks)
    merged = []
    for name in names:
        of_name = [(seed, check) for seed, checks in found for check in checks if check.name == name]
        seed, worst_one = min(of_name, key=lambda pair: order.index(pair[1].verdict))
        alike = sum(check.verdict == worst_one.verdict for _, check in of_name)
        said = (
            worst_one.finding if len(found) == 1 else f"{alike} of {len(found)} runs. Seed {seed}: {worst_one.finding}"
        )
        merged.append(Check(name=name, verdict=worst_one.verdict, finding=said))
    return merged
