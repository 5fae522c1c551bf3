"""The command ``choral ledger``: what was spent, what several ledgers come to together, whether one was put back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from choral.cli.arguments import parse
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.verify import Evidence


@dataclass(frozen=True, kw_only=True)
class LedgerFlags:
    """Read ledgers: files, or folders of them. Nothing is spent or written.

    show: whose each is, what was planned and released, and what it costs. sum: what all of them cost together, as for a
    record that is in every one. head: the digest of the last line and the number of events, to be kept where the
    ledger's owner cannot change it; with --against, whether a ledger passes through the heads that were signed.

    Exit code 0; 1: a ledger is older than what was signed of it, or another; 2: wrong usage, or a damaged ledger.
    """

    action: Annotated[Literal["show", "sum", "head"], tyro.conf.Positional]
    """What to say of them."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    """Ledger files, or folders."""
    against: tuple[Path, ...] = ()
    """With head: receipts, manifests, or run folders that hold both."""
    delta: float | None = None
    """With sum: at which delta; by default the ledgers' largest."""
    json: bool = False
    """Print the numbers as JSON."""


def ledger(words: list[str]) -> int:
    wanted = parse("ledger", words, LedgerFlags)
    if wanted.against and wanted.action != "head":
        raise ConfigError("--against belongs to head", hint="choral ledger head FILE --against RECEIPTS")
    if wanted.delta is not None and wanted.action != "sum":
        raise ConfigError("--delta belongs to sum", hint="each ledger states its own")
    ledgers = [_opened(path) for path in _paths(wanted.files)]
    if wanted.json and wanted.action != "head":
        print(json.dumps(_numbers(ledgers, wanted), indent=1))
        return 0
    if wanted.action == "sum":
        print(_sum(ledgers, wanted.delta))
        return 0
    if wanted.action == "show":
        print("\n\n".join(_shown(each) for each in ledgers))
        return 0
    lines, whole = _heads(ledgers, wanted.against)
    if wanted.json:
        heads = [{"file": str(e.path), "holder": e.holder, "head": e.head, "events": len(_events(e))} for e in ledgers]
        print(json.dumps({"heads": heads, "holds": whole if wanted.against else None, "said": lines}, indent=1))
        return 0 if whole else 1
    print("\n".join(lines))
    return 0 if whole else 1


def _paths(given: Sequence[Path]) -> list[Path]:
    """Raises: ConfigError where there are none."""
    found = [each for path in given for each in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        named = ", ".join(map(str, missing or given)) or "nothing"
        raise ConfigError(f"no ledger at {named}", hint="a ledger is a file NAME.jsonl, as in DIR/ledger of a run")
    return found


def _opened(path: Path) -> Ledger:
    """Raises: LedgerError."""
    from choral.privacy import Ledger

    return Ledger(path)


def _events(ledger: Ledger) -> tuple[object, ...]:
    return ledger.releases if ledger.unit == "client" else ledger.events


def _holder(ledger: Ledger) -> str:
    """As it may be printed on a terminal."""
    from choral.doors import visible

    return visible(str(ledger.holder))


def _shown(ledger: Ledger) -> str:
    from choral.privacy.accounting.budget import at_least, shown
    from choral.privacy.accounting.events import stated
    from choral.privacy.ledgers.plans import guarantee

    delta = float(ledger.delta or 0.0)
    lines = [f"{ledger.path}: {_holder(ledger)}, for each {ledger.unit} ({stated(ledger.neighbours)}), delta {delta:g}"]
    for number, (plan, events) in enumerate(ledger.segments, 1):
        promised = f"epsilon {plan.epsilon:g} promised" if plan else "events that no plan announced"
        planned = f" of {sum(part.times for part in plan.parts)} planned" if plan else ""
        lines.append(f"  plan {number}: {promised}; {len(events)} releases{planned}")
        lines += [f"    {times} x {_in_words(said)}" for said, times in Counter(map(repr, events)).items()]
    held = guarantee(ledger)
    kept = "no guarantee for an end chosen as one goes" if held is None else f"{at_least(held)} guaranteed"
    lines.append(f"  spent: epsilon {at_least(ledger.epsilon(delta))} at delta {shown(delta)}; {kept}")
    return "\n".join(lines)


def _in_words(said: str) -> str:
    kind, _, rest = said.partition("(")
    return f"{kind}: {rest.removesuffix(')').replace('=', ' ')}"


def _numbers(ledgers: Sequence[Ledger], wanted: LedgerFlags) -> Any:
    """What is printed, as plain JSON data."""
    from choral.privacy.ledgers.plans import guarantee

    if wanted.action == "sum":
        total, at = _total(ledgers, wanted.delta)
        return {
            "ledgers": len(ledgers),
            "releases": sum(len(_events(each)) for each in ledgers),
            "epsilon": total,
            "delta": at,
            "unit": str(ledgers[0].unit),
            "holders": sorted({str(each.holder) for each in ledgers}),
        }
    return [
        {
            "file": str(each.path),
            "holder": each.holder,
            "unit": each.unit,
            "delta": each.delta,
            "releases": len(_events(each)),
            "epsilon": each.epsilon(float(each.delta or 0.0)),
            "guaranteed": guarantee(each),
        }
        for each in ledgers
    ]


def _total(ledgers: Sequence[Ledger], delta: float | None) -> tuple[float, float]:
    """Epsilon of all, and at which delta. Raises: ConfigError for ledgers that do not add up."""
    from choral.privacy.accounting.events import relation_of
    from choral.privacy.ledgers.plans import fixed_cost

    kinds = {(each.unit, relation_of(each.neighbours)) for each in ledgers}
    if len(kinds) > 1:
        said = "; ".join(f"each {unit}, {relation}" for unit, relation in sorted(kinds))
        raise ConfigError(f"these ledgers do not add up: {said}", hint="sum those of one unit and one relation")
    ((_, relation),) = kinds
    at = delta if delta is not None else max(float(each.delta or 0.0) for each in ledgers)
    events = [event for each in ledgers for event in _events(each)]
    return fixed_cost(events, at, relation), at  # type: ignore[arg-type]


def _sum(ledgers: Sequence[Ledger], delta: float | None) -> str:
    """Raises: ConfigError for ledgers that do not add up."""
    from choral.privacy.accounting.budget import at_least, shown

    total, at = _total(ledgers, delta)
    events, unit = [event for each in ledgers for event in _events(each)], ledgers[0].unit
    holders = sorted({_holder(each) for each in ledgers})
    whose = f"{unit} of {holders[0]}" if len(holders) == 1 else f"{unit} that is in all of {', '.join(holders)}"
    return (
        f"{len(ledgers)} ledgers, {len(events)} releases: epsilon {at_least(total)} at delta {shown(at)} for each"
        f" {whose}, if settings and ends were fixed in advance; every ledger's own promise holds whoever chose them"
    )


def _heads(ledgers: Sequence[Ledger], against: Sequence[Path]) -> tuple[list[str], bool]:
    """A line for each, and whether all pass through what was signed of them."""
    evidence, lines, whole = _evidence(against), [], True
    for each in ledgers:
        count = len(_events(each))
        lines.append(f"{each.head} after {count} events: {_holder(each)} ({each.path})")
        signed = _signed(evidence, str(each.holder))
        wrong = []
        for where, events, head in signed:
            if events > count:
                wrong.append(f"{where} has seen {events} events: this ledger is an older copy, or was cut")
            elif each.head_after(events) != head:
                wrong.append(f"{where} has seen another head after {events} events: this is another ledger")
        lines += [f"  NOT WHAT WAS SIGNED: {said}" for said in wrong]
        if against and not wrong:
            lines.append(f"  passes through all {len(signed)} heads that were signed" if signed else _UNSIGNED)
        whole = whole and not wrong and bool(signed or not against)
    lines += [f"  DOES NOT HOLD: {problem}" for problem in evidence.problems]
    return lines, whole and not evidence.problems


_UNSIGNED = "  nothing that was given signs for it"


def _evidence(against: Sequence[Path]) -> Evidence:
    from choral.protocols.crypto.keys import ed25519_verify
    from choral.verify import Evidence

    evidence = Evidence(verify=ed25519_verify)
    for path in against:
        inside = [*path.glob("manifest.json"), *sorted(path.glob("receipts/*.jsonl"))] if path.is_dir() else [path]
        for each in inside:
            evidence.take(each.name, each.read_bytes())
    return evidence


def _signed(evidence: Evidence, holder: str) -> list[tuple[str, int, str]]:
    """Where, how many events, and the head after them."""
    found = [
        (f"the receipt of round {said['round']}", said["ledger"]["events"][1], said["ledger"]["after"])
        for said in evidence.rounds
        if said["party"] == holder and said["ledger"]
    ]
    manifests = [each["ledgers"][holder] for each in evidence.manifests.values() if holder in each["ledgers"]]
    return found + [("the manifest", each["events"], each["head"]) for each in manifests]
