"""What `compare` and `audit` are given, held against its types before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from choral.audits.costs.prices import Prices
from choral.audits.findings.evidence import InversionAudit, Probe, ScoreAudit
from choral.audits.findings.schema import FailedRuns
from choral.errors import ConfigError
from choral.trainers.run_folder.run import Run
from choral.trainers.task import arguments

_RUN = "what federate or centralize returned, or Run.load(FOLDER)"


def check_audit(run: Any, attacks: Any, probe: Any, inversion: Any, prices: Any) -> None:
    """Raises: ConfigError for what is neither a run nor the path of its folder, and for other evidence or prices."""
    arguments.instance(run, "run", (Run, str, Path), _RUN)
    check_evidence(attacks, probe, inversion)
    check_prices(prices)


def check_prices(prices: Any) -> None:
    """Raises: ConfigError for anything but a table of prices, or None."""
    if prices is not None:
        arguments.instance(prices, "prices", Prices, "choral.audits.read_prices(FILE)")


def check_evidence(attacks: Any, probe: Any, inversion: Any, place: str = "") -> None:
    """place: the configuration that it is on, in brackets, for the message. Raises: ConfigError for other types."""
    _listed(attacks, f"attacks{place}", ScoreAudit, "what choral.audits.audit_scores returned, in a list")
    for value, name, kind in ((probe, "probe", Probe), (inversion, "inversion", InversionAudit)):
        if value is not None:
            arguments.instance(value, f"{name}{place}", kind, f"the {kind.__name__} that the attack returned")


def check_arms(arms: Any, name: str = "arms") -> None:
    """Raises: ConfigError for anything but a mapping of names to runs, or to lists of them."""
    for key, runs in _mapped(arms, name, "runs").items():
        if not isinstance(runs, Run):
            _listed(runs, f"{name}[{key!r:.80}]", Run, _RUN)


def check_levels(references: Any) -> None:
    """Raises: ConfigError for anything but metric -> name -> number."""
    for metric, levels in _mapped(references, "references", "levels").items():
        for name, level in _mapped(levels, f"references[{metric!r:.80}]", "levels").items():
            arguments.number(level, f"references[{metric!r:.80}][{name!r:.80}]", "the level that the line is drawn at")


def check_comparison(texts: Mapping[str, Any], also: Any, target: Any, evidence: Any) -> None:
    """texts: by name. Raises: ConfigError for other types."""
    for name, text in texts.items():
        arguments.instance(text, name, str, f'{name}="..."')
    _listed(also, "also", str, 'names of metrics, as in also=["loss"]')
    if target is not None:
        arguments.number(target, "target", "a level of the metric")
    if evidence is not None:
        arguments.instance(evidence, "evidence", ArmEvidence, "ArmEvidence(attacks={name: [...]}, probes={name: ...})")


@dataclass(frozen=True, kw_only=True)
class ArmEvidence:
    """What was gathered on the configurations that are compared.

    attacks, probes: by the name of one, as :func:`choral.audits.audit` takes them. failed: by name, why an attack on it
    could not be carried out, which leaves it unverified. not_trained: configurations, or runs of them, that were to be
    compared and failed; they are rows with a reason.

    Raises: ConfigError for values of other types.
    """

    attacks: Mapping[str, Sequence[ScoreAudit]] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    not_trained: Sequence[FailedRuns] = ()

    def __post_init__(self) -> None:
        for arm, found in _mapped(self.attacks, "attacks", "lists of scores").items():
            check_evidence(found, None, None, f"[{arm!r:.80}]")
        for arm, probe in _mapped(self.probes, "probes", "probes").items():
            arguments.instance(probe, f"probes[{arm!r:.80}]", Probe, "the Probe that the attack returned")
        for arm, why in _mapped(self.failed, "failed", "reasons").items():
            arguments.instance(why, f"failed[{arm!r:.80}]", str, "why the attack could not be carried out")
        _listed(
            self.not_trained, "not_trained", FailedRuns, "what the training of it raised, as choral compare lists it"
        )


def _mapped(value: Any, name: str, of: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f"{name} is {arguments.shown(value)}, expected a mapping of names to {of}", hint='as in {"cloud": ...}'
        )
    return value


def _listed(value: Any, name: str, kind: type, hint: str) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{name} is {arguments.shown(value)}, expected a list of {kind.__name__}", hint=hint)
    for place, one in enumerate(value):
        arguments.instance(one, f"{name}[{place}]", kind, hint)
