"""Compare ways of training on the same data: what privacy and distribution cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from choral.audits.comparison.arms import arm_of, budget_curves, check_runs, difference_of
from choral.audits.comparison.checks import comparison_checks, weights_match
from choral.audits.comparison.composition import composed
from choral.audits.comparison.fairness import fairness_metric, fairness_of
from choral.audits.costs.costs import Costs, costs_of
from choral.audits.costs.job_bills import job_bills
from choral.audits.costs.prices import Prices, read_prices
from choral.audits.costs.target import costs_to_target
from choral.audits.costs.winners import winner_maps
from choral.audits.findings import door
from choral.audits.findings.claims import caveats, merged_versions, units_of
from choral.audits.findings.context import Context
from choral.audits.findings.door import ArmEvidence
from choral.audits.findings.schema import (
    FORMAT_VERSION,
    NOT_RUN,
    ORDER,
    ArmAudit,
    ArmResult,
    BudgetCurve,
    Check,
    FailedRuns,
    NotRun,
    Reference,
    WeightsMatch,
)
from choral.audits.findings.whole import Composed
from choral.audits.report.storage import read_report, save_report
from choral.audits.run.arm_audit import Rows, audited, ledger_rows
from choral.audits.run.signed_checks import UNBOUND, cited_manifest
from choral.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from choral.trainers.run_folder.run import Run

TITLE = "What privacy and distribution cost"


class Comparison(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="comparison"
):
    """What :func:`compare` found. JSON holds exactly these fields, and HTML is drawn from them alone.

    metric: which evaluation arms are judged by. baseline: the arm that differences are to. references: levels to hold
    metrics against. made: when, in UTC. level: of every interval. failed: what was to be compared and could not be
    trained. composed: what all private trainings that are shown cost together. matches: final weights under different
    secure sums, per seed. costs: rounds, bytes, seconds, energy and money, with the prices used; None where the runs
    did not record what they need. context: what only a human knows, None where nobody stated it. tolerance: by how much
    of the metric a configuration may be worse than the baseline to be recommended.
    """

    format: Literal["choral-report"] = "choral-report"
    version: int = FORMAT_VERSION
    title: str
    made: str
    metric: str
    baseline: str
    references: tuple[Reference, ...] = ()
    level: float = 0.95
    arms: tuple[ArmResult, ...]
    failed: tuple[FailedRuns, ...] = ()
    budgets: tuple[BudgetCurve, ...] = ()
    composed: tuple[Composed, ...] = ()
    checks: tuple[Check, ...]
    matches: tuple[WeightsMatch, ...] = ()
    costs: Costs | None = None
    context: Context | None = None
    tolerance: float = 0.05
    not_run: tuple[NotRun, ...] = NOT_RUN
    caveats: tuple[str, ...]
    versions: dict[str, str]

    @property
    def exit_code(self) -> int:
        """1 if any check is violated, in an arm or between them; else 2 if anything failed; else 1 if the evidence for
        some arm is not verified, as :class:`Audit` has it; else 0."""
        verdicts = [arm.audit.verdict for arm in self.arms if arm.audit is not None]
        if "violated" in verdicts or any(check.verdict == "violated" for check in self.checks):
            return 1
        return 2 if self.failed else int("unverified" in verdicts)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The one that arms are judged by, and the others."""
        return (self.metric, *(measure.metric for measure in self.arms[0].more))

    def __repr__(self) -> str:
        from choral.audits.report.notebook import comparison_line

        return comparison_line(self)

    def _repr_html_(self) -> str:
        from choral.audits.report.notebook import comparison_table

        return comparison_table(self)

    def stated(self, context: Context | None = None, tolerance: float | None = None) -> Self:
        """Return the report with what only a human knows, and how much worse a recommended configuration may be.

        Raises: ConfigError (a tolerance that is no number of 0 or more).
        """
        wanted = self.tolerance if tolerance is None else tolerance
        if not (math.isfinite(wanted) and wanted >= 0.0):
            raise ConfigError(f"tolerance is {wanted}, expected 0 or more of {self.metric}", hint="0.05 is five points")
        return msgspec.structs.replace(self, context=context or self.context, tolerance=wanted)

    def save(self, path: str | Path, *, full: bool = False) -> Path:
        """Write the report by suffix: ``.json``, one offline ``.html`` file, a ``.md`` summary for a model card, or the
        curves over rounds alone as ``.svg``. full: HTML with all details open, which are printed too.

        Raises: ConfigError for another suffix.
        """
        from choral.audits.report.html import comparison_drawing, comparison_page
        from choral.audits.report.markdown import comparison_markdown

        return save_report(
            self, path, lambda report: comparison_page(report, full=full), comparison_markdown, comparison_drawing
        )

    def print(self, console: Console | None = None) -> None:
        """Print the table to the terminal, or to ``console``."""
        from choral.audits.report.terminal import print_comparison

        print_comparison(self, console)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved ``.json`` back, strictly.

        Raises: ReportError if it is missing, damaged, of another version or no comparison.
        """
        return read_report(path, cls)


def compare(
    arms: Mapping[str, Run | Sequence[Run]],
    *,
    budgets: Mapping[str, Sequence[Run]] | None = None,
    baseline: str | None = None,
    metric: str = "accuracy",
    also: Sequence[str] = (),
    references: Mapping[str, Mapping[str, float]] | None = None,
    title: str = TITLE,
    prices: Prices | None = None,
    target: float | None = None,
    evidence: ArmEvidence | None = None,
) -> Comparison:
    """Compare arms, each one run or several that differ in their seed.

    arms: name -> runs. Names are free; ``cloud``, ``cloud-dp``, ``federated``, ``federated-masked`` and
        ``federated-dp`` always come first and in this order.
    budgets: name -> all private runs at several epsilons and seeds, for the budget-against-accuracy curve.
    baseline: the arm that differences are to; by default ``cloud``, else the first centralized arm without privacy,
        else the first arm.
    metric: which of the evaluations to compare. also: others to show beside it. A metric whose name ends in "gap" is
        drawn on a logarithmic axis; "accuracy" and "test error" are shares.
    references: metric -> name -> level, drawn across its curves: what always the same answer gets, for instance.
    prices: what costs are computed with (:func:`choral.audits.read_prices`); by default the shipped table.
    target: level of ``metric`` whose cost is asked; by default 95 % of what the baseline gained.
    evidence: attacks and probes that were made of the arms, and what could not be made or trained.

    Every run in ``arms`` is audited as :func:`choral.audits.audit` does, except that a ledger or transcript that does
    not verify makes its arm violated instead of raising, and an audit that breaks off leaves its arm unverified.

    Intervals are Student's at 95 %, over seeds; differences are paired by seed where the seeds are the same.

    Raises: ConfigError for no arms, an arm without runs, an interrupted run, runs of one arm with unlike settings, an
        unknown baseline or metric; DataError for a metric that is not finite.
    """
    door.check_arms(arms)
    door.check_arms({} if budgets is None else budgets, "budgets")
    door.check_levels({} if references is None else references)
    texts = {"metric": metric, "title": title} | ({} if baseline is None else {"baseline": baseline})
    door.check_comparison(texts, also, target, evidence)
    door.check_prices(prices)
    if not arms:
        raise ConfigError("nothing to compare: no arms", hint='give at least one, as in compare({"cloud": run})')
    metrics = (metric, *also)
    levels = _references(references or {}, metrics)
    ready = {name: check_runs(name, _as_list(arms[name]), metrics) for name in _ordered(arms)}
    base, books = _baseline(ready, baseline), ledger_rows()
    gathered = evidence or ArmEvidence()
    audits = _audits(ready, books, gathered)
    found = _compared(ready, budgets or {}, _rows(ready, base, metrics, audits), books, base=base, metrics=metrics)
    table = prices or read_prices()
    if (costs := costs_of(ready, table)) is not None:
        level = costs_to_target(ready, metric, base, table, target)
        maps, job = winner_maps(ready, level, table), job_bills(ready, level, table.job, table)
        costs = msgspec.structs.replace(costs, target=level, maps=maps, job=job)
    return msgspec.structs.replace(
        found, title=title, references=levels, failed=tuple(gathered.not_trained), costs=costs
    )


def _audits(arms: Mapping[str, Sequence[Run]], books: Rows, evidence: ArmEvidence) -> dict[str, ArmAudit]:
    """The audit of each arm. Raises: ConfigError for evidence on what is no arm."""
    attacks, probes, failed = evidence.attacks, evidence.probes, evidence.failed
    if strange := sorted({*attacks, *probes, *failed} - arms.keys()):
        raise ConfigError(f"evidence on {strange[0]!r}, which is no arm", hint=f"name one of: {', '.join(arms)}")
    return {
        name: audited(runs, books, attacks=attacks.get(name, ()), probe=probes.get(name), failed=failed.get(name, ""))
        for name, runs in arms.items()
    }


def _compared(
    arms: Mapping[str, Sequence[Run]],
    budgets: Mapping[str, Sequence[Run]],
    rows: Sequence[ArmResult],
    books: Rows,
    *,
    base: str,
    metrics: Sequence[str],
) -> Comparison:
    """What the arms show, each by itself and side by side."""
    matches, verdict = weights_match(arms)
    every = [run.info for runs in (*arms.values(), *budgets.values()) for run in runs]
    return Comparison(
        title=TITLE,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        metric=metrics[0],
        baseline=base,
        arms=tuple(rows),
        budgets=budget_curves({name: list(budgets[name]) for name in _ordered(budgets)}, metrics[0]) if budgets else (),
        composed=composed(arms, budgets),
        checks=comparison_checks(arms, budgets, rows, metrics[0], books) + ((verdict,) if verdict else ()),
        matches=matches,
        not_run=tuple(
            entry
            for entry in (*NOT_RUN, UNBOUND)
            if all(row.audit is None or entry in row.audit.not_run for row in rows)
        ),
        caveats=caveats(units_of(every), compared=True, metrics=metrics),
        versions=merged_versions(every),
    )


def _rows(
    arms: Mapping[str, Sequence[Run]], base: str, metrics: Sequence[str], audits: Mapping[str, ArmAudit]
) -> list[ArmResult]:
    """metrics: the one that arms are judged by, and the others."""
    metric, *also = metrics
    of_parties = fairness_metric(arms, metrics)
    rows = []
    for name, runs in arms.items():
        other = arms[base] if name != base else None
        rows.append(
            msgspec.structs.replace(
                arm_of(name, runs, metric, also),
                difference=difference_of(runs, other, base, metric) if other else None,
                fairness=fairness_of(name, runs, other, base, of_parties),
                audit=audits[name],
                manifests=tuple(cited for run in runs if (cited := cited_manifest(run)) is not None),
            )
        )
    return rows


def _references(given: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> tuple[Reference, ...]:
    """Of the metrics that are compared. Raises: ConfigError for a metric twice; DataError for a level of no number."""
    if len(set(metrics)) < len(metrics):
        raise ConfigError(f"a metric is named twice: {', '.join(metrics)}", hint="name each once")
    made = tuple(
        Reference(metric=metric, name=name, level=float(level))
        for metric in metrics
        for name, level in given.get(metric, {}).items()
    )
    for reference in made:
        if not math.isfinite(reference.level):
            raise DataError(f"the reference {reference.name!r} of {reference.metric} is {reference.level}")
    return made


def _as_list(runs: Run | Sequence[Run]) -> Sequence[Run]:
    return runs if isinstance(runs, Sequence) else [runs]


def _ordered(names: Mapping[str, object]) -> list[str]:
    """The well-known arms in their order, then the others as given: tables and colours stay put between reports."""
    return [name for name in ORDER if name in names] + [name for name in names if name not in ORDER]


def _baseline(arms: Mapping[str, Sequence[Run]], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in arms:
            raise ConfigError(f"no arm {wanted!r} to serve as baseline", hint=f"name one of: {', '.join(arms)}")
        return wanted
    if "cloud" in arms:
        return "cloud"
    pooled = (name for name, runs in arms.items() if runs[0].info.kind == "centralized" and not runs[0].info.privacy)
    return next(pooled, next(iter(arms)))
