"""Audit one run, or a model that was trained elsewhere: is what it claims borne out by what it left behind?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from choral.audits.budgets.accountants import Accountants, accountants_check, accountants_of
from choral.audits.budgets.budgets import budget_checks, owner_budgets
from choral.audits.budgets.consistency import books_checks
from choral.audits.budgets.parameters import parameters_of
from choral.audits.budgets.participation import ParticipationSummary, participation_checks, participation_of
from choral.audits.costs.costs import Costs, costs_of
from choral.audits.costs.prices import Prices, read_prices
from choral.audits.findings import door
from choral.audits.findings.claims import caveats, check_costs, claim_of, no_claim, short_path, site_caveats, units_of
from choral.audits.findings.evidence import InversionAudit, Probe, ScoreAudit
from choral.audits.findings.parameters import PromiseParameters, lattice_of
from choral.audits.findings.schema import (
    FORMAT_VERSION,
    NOT_RUN,
    Check,
    NotRun,
    OwnerBudget,
    RunFacts,
    Spread,
    Trace,
    Verdict,
)
from choral.audits.findings.statistics import data_owners_of, spreads
from choral.audits.findings.text import power
from choral.audits.findings.verdict import evidence_checks, not_run, verdict_sentence, worst
from choral.audits.findings.whole import CitedManifest
from choral.audits.report.storage import read_report, save_report
from choral.audits.run.signed_checks import UNBOUND, cited_manifest, signed_checks
from choral.audits.transcripts.transcript_audit import TranscriptAudit, transcript_audit, transcript_gone
from choral.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from choral.trainers.run_folder.run import Run


_KEYS = {"transcript": "seen"}  # in report.json, since version 1


class Audit(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="audit",
    rename=_KEYS,
):
    """What an audit found. JSON holds exactly these fields, and HTML and Markdown are drawn from them alone.

    verdict: "violated" if any check found a violation, else "unverified" if any could not be carried out, else
        "holds". sentence: the verdict in words, with the largest epsilon that a test here could have detected. Both
        speak of the claim and the checks that were made; ``not_run`` lists what was not.
    claim: the promise in words. promised: whether there is one. run: None for a model that was trained elsewhere.
    budgets, accountants, parameters, participation: the ledgers' own audit. spreads: how unlike the data owners are, as
        run.json says. costs: rounds, bytes, energy, money. transcript: what the server saw ("seen" in JSON). attacks,
        probe, inversion: evidence from attacks. traces: each metric by round. manifest: of the run, which binds all its
        files; None without.
    """

    format: Literal["choral-report"] = "choral-report"
    version: int = FORMAT_VERSION
    title: str
    made: str
    verdict: Verdict
    sentence: str
    claim: str
    promised: bool
    checks: tuple[Check, ...]
    attacks: tuple[ScoreAudit, ...] = ()
    probe: Probe | None = None
    inversion: InversionAudit | None = None
    budgets: tuple[OwnerBudget, ...] = ()
    spreads: tuple[Spread, ...] = ()
    accountants: tuple[Accountants, ...] = ()
    parameters: PromiseParameters | None = None
    participation: ParticipationSummary | None = None
    transcript: TranscriptAudit | None = None
    costs: Costs | None = None
    traces: tuple[Trace, ...] = ()
    run: RunFacts | None = None
    manifest: CitedManifest | None = None
    not_run: tuple[NotRun, ...] = NOT_RUN
    caveats: tuple[str, ...]
    versions: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0 if nothing contradicts the claim; 1 if something does, or if a promise cannot be verified: a promise
        without evidence is no pass."""
        return 0 if self.verdict == "holds" else 1

    def __repr__(self) -> str:
        from choral.audits.report.notebook import audit_line

        return audit_line(self)

    def _repr_html_(self) -> str:
        from choral.audits.report.notebook import audit_table

        return audit_table(self)

    def save(self, path: str | Path) -> Path:
        """Write the report by suffix: ``.json``, one offline ``.html`` file, or a ``.md`` summary for a model card.

        Raises: ConfigError for another suffix.
        """
        from choral.audits.report.html import audit_page
        from choral.audits.report.markdown import audit_markdown

        return save_report(self, path, audit_page, audit_markdown)

    def print(self, console: Console | None = None) -> None:
        """Print the findings to the terminal, or to ``console``."""
        from choral.audits.report.terminal import print_audit

        print_audit(self, console)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved ``.json`` back, strictly.

        Raises: ReportError if it is missing, damaged, of another version or no audit.
        """
        return read_report(path, cls)


def audit(
    run: Run | str | Path,
    *,
    prices: Prices | None = None,
    attacks: Sequence[ScoreAudit] = (),
    probe: Probe | None = None,
    inversion: InversionAudit | None = None,
) -> Audit:
    """Audit a run, or the run in a folder. Nothing is trained.

    Checked are the budgets (each data owner's epsilon is recomputed from the hash-chained ledger by several
    accountants and held against run.json and against the promise), participation, the history, and what the server saw
    if that was recorded. ``attacks``, ``probe`` and ``inversion`` are evidence that was gathered before; ``not_run``
    says which was not. A ledger that is missing leaves the claim unverified; one that is damaged or edited raises. The
    hash chain cannot bind a data owner who rewrites all of its own ledger.

    Raises: RunFolderError for a folder that is missing, incomplete or damaged; LedgerError for a ledger that is;
        DataError for a metric or cost that is not finite; ConfigError for a run without any history.
    """
    door.check_audit(run, attacks, probe, inversion, prices)
    run = _readable(run)
    budgets = owner_budgets(run)
    accountants, participation, transcript = accountants_of(run), participation_of(run), transcript_audit(run)
    manifest = cited_manifest(run)
    checks = (
        *budget_checks(run, budgets),
        *books_checks(run),
        *signed_checks(run),
        *accountants_check(accountants),
        *participation_checks(run, participation),
        *(transcript.checks if transcript else transcript_gone(run)),
        *evidence_checks(attacks, probe, inversion),
    )
    info = run.info
    verdict, claim = worst(checks), claim_of([info]) if info.spent else None
    return Audit(
        title=f"Audit of {short_path(run.folder)}" if run.folder else f"Audit of a {info.kind} run",
        made=now(),
        verdict=verdict,
        sentence=verdict_sentence(verdict, checks, [*attacks, *([probe.canaries] if probe else [])]),
        claim=_in_words(run, claim.sentence if claim else ""),
        promised=info.privacy is not None,
        checks=checks,
        attacks=tuple(attacks),
        probe=probe,
        inversion=inversion,
        budgets=budgets,
        spreads=spreads(data_owners_of([run])),
        accountants=accountants,
        parameters=parameters_of(run),
        participation=participation,
        transcript=transcript,
        costs=costs_of({info.kind: [run]}, prices or read_prices()),
        traces=_traces(run),
        run=_facts(run),
        manifest=manifest,
        not_run=(*not_run(attacks, probe, inversion, transcript), *([] if manifest else [UNBOUND])),
        caveats=(*site_caveats(info), *caveats(units_of([info]), compared=False)),
        versions=dict(info.versions),
    )


def audit_evidence(
    title: str,
    *,
    attacks: Sequence[ScoreAudit] = (),
    probe: Probe | None = None,
    inversion: InversionAudit | None = None,
) -> Audit:
    """The report of a model that was trained elsewhere, from the evidence alone.

    Raises: ConfigError without any evidence.
    """
    from choral.trainers.run_folder.info import versions

    door.check_evidence(attacks, probe, inversion)
    if not (attacks or probe or inversion):
        raise ConfigError("there is nothing to report", hint="give scores, a probe or an inversion")
    checks = evidence_checks(attacks, probe, inversion)
    evidence = [*attacks, *([probe.canaries] if probe else [])]
    claimed = [attack for attack in evidence if attack.claimed is not None]
    if claimed and not any(attack.decisive for attack in claimed):
        finding = "Scores of a split bound no epsilon, and no ledger is here: nothing could have refuted the claim."
        checks += (Check(name="The claim was put to a test", verdict="unverified", finding=finding),)
    verdict = worst(checks)
    claim = "No differential privacy is claimed."
    if claimed:
        said = f"ε\u00a0=\u00a0{claimed[0].claimed:.4g}, δ\u00a0=\u00a0{power(claimed[0].delta)}"
        claim = f"Training is claimed to be ({said})-differentially private for each {claimed[0].unit}."
    return Audit(
        title=title,
        made=now(),
        verdict=verdict,
        sentence=verdict_sentence(verdict, checks, evidence),
        claim=f"{claim} The claim was given to the audit; no ledger backs it here.",
        promised=bool(claimed),
        checks=checks,
        attacks=tuple(attacks),
        probe=probe,
        inversion=inversion,
        not_run=not_run(attacks, probe, inversion, None),
        caveats=caveats({attack.unit for attack in claimed}, compared=False),
        versions=versions(),
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _readable(run: Run | str | Path) -> Run:
    """The run, read if it is in a folder. Raises: as :func:`audit` does of what cannot be audited."""
    from choral.trainers.run_folder.run import Run

    if not isinstance(run, Run):
        run = Run.load(run)
    if not run.history:
        raise ConfigError("this run has no history: it ended before the initial evaluation", hint="run it again")
    check_costs(run.info, "this run")
    return run


def _facts(run: Run) -> RunFacts:
    info = run.info
    return RunFacts(
        training=info.kind,
        completed=run.history[-1].round,
        rounds=info.rounds,
        seed=info.seed,
        device=info.device,
        parameters=info.parameters,
        examples=dict(info.parties),
        secure_sum=msgspec.to_builtins(info.secure_sum),
        lattice=lattice_of(info.secure_sum),
        privacy=info.privacy,
        config=msgspec.to_builtins(info.config),
    )


def _in_words(run: Run, sentence: str) -> str:
    if run.info.privacy is None:
        return no_claim(run.info.kind, run.info.secure_sum)
    if sentence:
        return sentence
    asked = f"ε = {run.info.privacy['epsilon']:g}, δ = {power(float(run.info.privacy['delta']))}"
    return f"Differential privacy at {asked} was asked for; run.json records no spending."


def _traces(run: Run) -> tuple[Trace, ...]:
    """Every metric that each round has."""
    names = [name for name in run.history[0].metrics if all(name in entry.metrics for entry in run.history)]
    for entry in run.history:
        for name in names:
            if not math.isfinite(entry.metrics[name]):
                raise DataError(f"{name} is {entry.metrics[name]} after round {entry.round}, expected a finite number")
    names.sort(key=lambda name: name != "accuracy")
    return tuple(Trace(name=name, values=tuple(entry.metrics[name] for entry in run.history)) for name in names)
