"""Audit one run: is what it claims borne out by what it left behind?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from choral.audits.accountants import (
    Accountants,
    Participation,
    accountants_check,
    accountants_of,
    participation_checks,
    participation_of,
)
from choral.audits.budgets import budget_checks, holder_budgets
from choral.audits.claims import caveats, check_costs, claim_of, no_claim, short_path
from choral.audits.price import Costs, costs_of
from choral.audits.prices import Prices, read_prices
from choral.audits.report import FORMAT_VERSION, NOT_RUN, Check, HolderBudget, NotRun, Trace, Verdict
from choral.audits.seen import SeenAudit, seen_audit
from choral.audits.storage import read_report, save_report
from choral.audits.text import power
from choral.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from choral.trainers.run import Run


class Audit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="audit"):
    """What :func:`audit` found. JSON holds exactly these fields, and HTML is drawn from them alone.

    verdict: "violated" if any check found a violation, else "unverified" if any could not be carried out, else
        "holds". It speaks of the claim and the checks that were run; ``not_run`` lists what was not.
    claim: the promise in words. training: how the run was trained. completed: rounds done, of ``rounds``.
    examples: records per party. traces: each metric by round.
    """

    format: Literal["choral-report"] = "choral-report"
    version: int = FORMAT_VERSION
    title: str
    made: str
    verdict: Verdict
    claim: str
    promised: bool
    checks: tuple[Check, ...]
    budgets: tuple[HolderBudget, ...] = ()
    accountants: tuple[Accountants, ...] = ()
    participation: Participation | None = None
    costs: Costs | None = None
    seen: SeenAudit | None = None
    traces: tuple[Trace, ...]
    training: Literal["centralized", "federated"]
    completed: int
    rounds: int
    seed: int
    device: str
    parameters: int
    examples: dict[str, int]
    secure_sum: dict[str, Any] | None = None
    privacy: dict[str, float | int | str] | None = None
    config: dict[str, Any] = {}
    not_run: tuple[NotRun, ...] = NOT_RUN
    caveats: tuple[str, ...]
    versions: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0 if the claim holds; 1 if it is violated or cannot be verified: a promise without evidence is no pass."""
        return 0 if self.verdict == "holds" else 1

    def save(self, path: str | Path) -> Path:
        """Write the report as ``.json`` or as one offline ``.html`` file, by suffix.

        Raises: ConfigError for another suffix.
        """
        from choral.audits.html import audit_page

        return save_report(self, path, audit_page)

    def print(self, console: Console | None = None) -> None:
        """Print the findings to the terminal, or to ``console``."""
        from choral.audits.terminal import print_audit

        print_audit(self, console)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved ``.json`` back, strictly.

        Raises: ReportError if it is missing, damaged, of another version or no audit.
        """
        return read_report(path, cls)


def audit(run: Run | str | Path, *, prices: Prices | None = None) -> Audit:
    """Audit a run, or the run in a folder.

    Checked are the budgets (each data holder's epsilon is recomputed from the hash-chained ledger and held against
    run.json and against the promise) and the history. No attack is run; ``not_run`` says which, and what they would
    show. A ledger that is missing leaves the claim unverified; one that is damaged or edited raises. The hash chain
    cannot bind a holder who rewrites all of its own ledger.

    Raises: RunFolderError for a folder that is missing, incomplete or damaged; LedgerError for a ledger that is;
        DataError for a metric or cost that is not finite; ConfigError for a run without any history.
    """
    from choral.trainers.run import Run

    if not isinstance(run, Run):
        run = Run.load(run)
    if not run.history:
        raise ConfigError("this run has no history: it ended before the initial evaluation", hint="run it again")
    check_costs(run.info, "this run")
    budgets = holder_budgets(run)
    accountants, participation = accountants_of(run), participation_of(run)
    seen = seen_audit(run)
    checks = [
        *budget_checks(run, budgets),
        *accountants_check(accountants),
        *participation_checks(run, participation),
        *(seen.checks if seen else ()),
    ]
    info = run.info
    claim = claim_of([info]) if info.spent else None
    return Audit(
        title=f"Audit of {short_path(run.folder)}" if run.folder else f"Audit of a {info.kind} run",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=_worst(checks),
        claim=_in_words(run, claim.sentence if claim else ""),
        promised=info.privacy is not None,
        checks=tuple(checks),
        budgets=budgets,
        accountants=accountants,
        participation=participation,
        seen=seen,
        costs=costs_of({info.kind: [run]}, prices or read_prices()),
        traces=_traces(run),
        training=info.kind,
        completed=run.history[-1].round,
        rounds=info.rounds,
        seed=info.seed,
        device=info.device,
        parameters=info.parameters,
        examples=dict(info.parties),
        secure_sum=msgspec.to_builtins(info.secure_sum),
        privacy=info.privacy,
        config=msgspec.to_builtins(info.config),
        caveats=caveats(private=info.privacy is not None, compared=False),
        versions=dict(info.versions),
    )


def _in_words(run: Run, sentence: str) -> str:
    if run.info.privacy is None:
        return no_claim(run.info.kind, run.info.secure_sum)
    if sentence:
        return sentence
    asked = f"ε = {run.info.privacy['epsilon']:g}, δ = {power(float(run.info.privacy['delta']))}"
    return f"Differential privacy at {asked} was asked for; run.json records no spending."


def _worst(checks: Sequence[Check]) -> Verdict:
    found = {check.verdict for check in checks}
    return "violated" if "violated" in found else "unverified" if "unverified" in found else "holds"


def _traces(run: Run) -> tuple[Trace, ...]:
    """Every metric that each round has."""
    names = [name for name in run.history[0].metrics if all(name in entry.metrics for entry in run.history)]
    for entry in run.history:
        for name in names:
            if not math.isfinite(entry.metrics[name]):
                raise DataError(f"{name} is {entry.metrics[name]} after round {entry.round}, expected a finite number")
    names.sort(key=lambda name: name != "accuracy")
    return tuple(Trace(name=name, values=tuple(entry.metrics[name] for entry in run.history)) for name in names)
