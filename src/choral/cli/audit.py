"""The command ``choral audit``: a run folder, a file of scores, or a user's own training through two callables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from choral.audits.costs.prices import PriceSettings, read_prices
from choral.audits.report.storage import put_verifier
from choral.cli.arguments import parse
from choral.cli.exports import print_hazards, write_record
from choral.cli.report import STATISTICS, print_json
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.audits import Audit
    from choral.audits.attacks.score_files import Design
    from choral.audits.findings.evidence import Probe, ScoreAudit
    from choral.trainers import Run


_DESIGNS = (
    "Where the memberships of --scores come from. A wrong answer gives a bound that does not hold, so there is no"
    ' default; a file may state it by a first line \'# design: coins\', or by "design": "coins" in JSON. coins: one'
    " training, and each canary was put in or left out by a fair coin of its own (a random half of them is not that)."
    " runs: every score is of a training of its own, with or without the canary. split: records that were trained on"
    " against fresh ones; this gives an ROC, and no bound."
)


_BELONGS = (
    ("wrap", "probe"),
    ("task", "inversion"),
    ("data_dir", "inversion"),
    ("design", "scores"),
    ("context", "registry"),
)


@dataclass(frozen=True, kw_only=True)
class AuditFlags:
    """Hold a privacy claim against evidence: a run folder, a file of scores, or your own training.

    A run folder is audited without training: ledgers by several accountants, participation, what the server saw, costs;
    a folder of `choral stats` with sites is held against what the sites signed.
    --scores, --model, --probe and --inversion add evidence: the books show what was paid for, only an attack shows what
    leaks. All but --inversion also work without a run.

    Exit code 0: nothing contradicts the claim. 1: it is violated at the stated confidence, or it cannot be verified
    because a ledger is missing. 2: wrong usage or bad input.
    """

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = None
    """The run folder."""
    scores: Path | None = None
    """Scores of canaries: CSV headed score,member or JSON {"scores": [...], "members": [...]}; higher says member."""
    model: Path | None = None
    """Python file with canaries, train(members) and score(model, canaries); it is run, and trains once."""
    design: Annotated[Literal["coins", "runs", "split"] | None, tyro.conf.arg(help=_DESIGNS)] = None
    epsilon: float | None = None
    """The claim that evidence is held against; by default the run's."""
    delta: float | None = None
    """Delta of that claim; by default the run's."""
    unit: str = "record"
    """Whose membership the canaries stand for."""
    confidence: float = 0.95
    """Of a violation."""
    attack: str = "scores as given"
    """What made the scores, for the report."""
    probe: bool = False
    """Train twice for seconds on records made for it, under the run's promise: noise, its reuse, sampling, clipping."""
    wrap: Path | None = None
    """With --probe: Python file with wrap(privacy) -> a function that makes (model, optimizer, loader) private; run."""
    inversion: bool = False
    """Try to rebuild a record from an update of the run's model: as sent, masked, in the sum, in the sum with noise."""
    task: Path | None = None
    """With --inversion: Python file with load(split, training, seed), if the run was of one; never from the folder."""
    data_dir: Path | None = None
    """With --inversion: folder of the data sets, for an embedded task that needs one."""
    out: Path | None = None
    """Folder of report.json and report.html; by default the run folder, and none without a run."""
    markdown: Path | None = None
    """File for a summary in Markdown, for a model card."""
    registry: Path | None = None
    """File (.yaml) for a draft record of the OpenDP Deployments Registry, of a run with a promise."""
    context: Path | None = None
    """With --registry: TOML file of what only people know, with the keys of [report.context]; else the run's own."""
    hazards: bool = False
    """Print the hazards of NIST SP 800-226 and how each stands, and nothing else of the table."""
    prices: Path | None = None
    """Price table (TOML) whose entries replace those of the shipped one."""
    price: PriceSettings = field(default_factory=PriceSettings)
    schema: bool = False
    """Print the JSON Schema of report.json and do nothing else."""
    json: bool = False
    """Print the report as JSON, in the place of the table."""
    quiet: bool = False
    """Print nothing but errors."""


def audit(words: list[str]) -> int:
    wanted = parse("audit", words, AuditFlags)
    if wanted.schema:
        from choral.audits.report_schema import json_schema

        print(json.dumps(json_schema(), indent=1, sort_keys=True))
        return 0
    if wanted.run is None and wanted.scores is None and wanted.model is None and not wanted.probe:
        hint = "name a run folder, or give --scores FILE, --model FILE.py or --probe"
        raise ConfigError("nothing to audit", hint=hint)
    if (wanted.registry is not None or wanted.hazards) and wanted.run is None:
        raise ConfigError("--registry and --hazards are of a run", hint="name the run folder")
    if wanted.registry is not None and wanted.registry.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"a record is YAML, not {wanted.registry.name!r}", hint="end its name in .yaml")
    if wanted.inversion and wanted.run is None:
        raise ConfigError("--inversion is of a run's model", hint="name the run folder")
    for flag, other in _BELONGS:
        if getattr(wanted, flag) is not None and not getattr(wanted, other):
            raise ConfigError(
                f"--{flag.replace('_', '-')} belongs to --{other}", hint=f"give --{other}, or leave it out"
            )
    if wanted.markdown is not None and wanted.markdown.suffix != ".md":
        raise ConfigError(f"the summary is Markdown, not {wanted.markdown.name!r}", hint="end its name in .md")
    result = _report(wanted)
    if wanted.json:
        print_json(result)
    elif wanted.hazards:
        print_hazards(result)
    elif not wanted.quiet:
        result.print()  # first: a folder that cannot be written to must not hide the verdict
    folder = wanted.out or wanted.run
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        result.save(folder / "report.json")
        result.save(folder / "report.html")
        put_verifier(folder)
        if not wanted.quiet and not wanted.json:
            print(f"report: {folder / 'report.html'}")
    if wanted.markdown is not None:
        result.save(wanted.markdown)
    if wanted.registry is not None and wanted.run is not None:
        write_record(wanted.run, wanted.registry, wanted.context)
    return result.exit_code


def _report(wanted: AuditFlags) -> Audit:
    from choral.audits import audit
    from choral.audits.run.run_audit import audit_evidence
    from choral.trainers import Run

    if wanted.run is not None and _of_statistics(wanted.run):
        return _statistics(wanted, wanted.run)
    prices = read_prices(wanted.prices, wanted.price)
    run = Run.load(wanted.run) if wanted.run is not None else None
    attacks, probe = _attacks(wanted, run), _probe(wanted, run)
    if run is None or wanted.run is None:
        source = wanted.model or wanted.scores or wanted.wrap
        named = source.name if source else "the private trainer"
        return audit_evidence(f"Audit of {named}", attacks=attacks, probe=probe)
    inversion = None
    if wanted.inversion:
        from choral.jobs.audit_evidence import invert_update

        inversion = invert_update(run, wanted.run, task=wanted.task, data_dir=wanted.data_dir)
    return audit(run, prices=prices, attacks=attacks, probe=probe, inversion=inversion)


def _of_statistics(folder: Path) -> bool:
    return (folder / STATISTICS).is_file() and not (folder / "run.json").is_file()


def _statistics(wanted: AuditFlags, folder: Path) -> Audit:
    """Raises: ConfigError for what is of a training."""
    from choral.audits.run.statistics_audit import audit_statistics

    for flag in ("scores", "model", "probe", "inversion", "registry", "hazards"):
        if getattr(wanted, flag):
            raise ConfigError(f"--{flag} is of a training, and {folder} holds statistics", hint="leave it out")
    return audit_statistics(folder)


def _probe(wanted: AuditFlags, run: Run | None) -> Probe | None:
    if not wanted.probe:
        return None
    from choral.jobs.audit_evidence import probe_trainer

    return probe_trainer(
        run, epsilon=wanted.epsilon, delta=wanted.delta, confidence=wanted.confidence, wrap=wanted.wrap
    )


def _attacks(wanted: AuditFlags, run: Run | None) -> list[ScoreAudit]:
    if wanted.scores is None and wanted.model is None:
        return []
    from choral.audits.attacks.score_audit import audit_scores, audit_training
    from choral.audits.attacks.score_files import read_score_file

    epsilon, delta = _claim(wanted, run)
    common: dict[str, Any] = {
        "delta": delta, "claimed": epsilon, "confidence": wanted.confidence, "unit": wanted.unit
    }  # fmt: skip
    found = []
    if wanted.scores is not None:
        scores, members, stated = read_score_file(wanted.scores)
        design = _design(wanted, stated)
        found.append(audit_scores(scores, members, design=design, attack=wanted.attack, **common))
        _refuse_too_few(found[-1])
    if wanted.model is not None:
        found.append(audit_training(*_callables(wanted.model), **common))
    return found


def _refuse_too_few(audit: ScoreAudit) -> None:
    """Raises: TooFewCanariesError where no scores of so few canaries could have refuted the claim, and more could."""
    from choral.audits.attacks.score_audit import canaries_needed
    from choral.audits.attacks.score_bounds import TooFewCanariesError

    bound = next((bound for bound in audit.bounds if bound.method == audit.decisive), None)
    if audit.design != "coins" or bound is None or audit.claimed is None or bound.ceiling > audit.claimed:
        return
    try:
        needed = canaries_needed(audit.claimed, delta=audit.delta, confidence=bound.confidence)
    except ConfigError:  # no number could: the report says so
        return
    raise TooFewCanariesError(
        f"{audit.scores} canaries can refute at most epsilon = {bound.ceiling:.3g}, and {audit.claimed:.4g} is claimed",
        hint=f"{needed} canaries are needed, and several times as many for a real attack; without --epsilon and a run"
        " these give a bound all the same",
    )


def _design(wanted: AuditFlags, stated: Design | None) -> Design:
    """Where the memberships come from, as the flag or the file says. Raises: ConfigError if neither does, or both."""
    design = wanted.design or stated
    if design is None:
        raise ConfigError(
            f"nothing says where the memberships in {wanted.scores} come from, and what follows depends on it",
            hint="give --design coins (one training, a fair coin for each canary), --design runs (each score of a"
            " training of its own) or --design split (training records against fresh ones: no bound)",
        )
    if stated not in (None, design):
        raise ConfigError(f"{wanted.scores} states the design {stated!r}, and --design is {design!r}")
    return design


def _claim(wanted: AuditFlags, run: Run | None) -> tuple[float | None, float]:
    """Epsilon and delta: as given, else those of the run's worst data owner.

    Raises: ConfigError without a delta, or when the canaries stand for another unit than the run's promise.
    """
    spent = run.spent if run else None
    if spent is not None and spent.unit != wanted.unit and wanted.epsilon is None:
        raise ConfigError(
            f"the run's promise is for each {spent.unit}, and the scores are of {wanted.unit}s",
            hint=f"give --unit {spent.unit} if a canary is one, or --epsilon of the claim that is meant",
        )
    epsilon = wanted.epsilon if wanted.epsilon is not None else spent.epsilon if spent else None
    delta = wanted.delta if wanted.delta is not None else spent.delta if spent else None
    if delta is None:
        raise ConfigError("scores are held against a claim at some delta", hint="give --delta, such as 1e-5")
    return epsilon, delta


def _callables(path: Path) -> tuple[Any, Any, list[Any]]:
    """train, score and the canaries of a user's file. Raises: ConfigError for a file without them."""
    from choral.jobs.training import load_module

    module = load_module(path, "a Python file with canaries, train(members) and score(model, canaries)")
    for name in ("train", "score"):
        if not callable(getattr(module, name, None)):
            raise ConfigError(f"{path} has no function {name}", hint="it needs canaries, train and score")
    canaries = getattr(module, "canaries", None)
    canaries = canaries() if callable(canaries) else canaries
    try:
        listed = list(canaries)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(
            f"{path} has no canaries", hint="a list of them, or a function that returns one, called canaries"
        ) from None
    return module.train, module.score, listed
