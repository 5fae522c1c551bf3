"""Every figure that has a peer or a limit, in one go: ours, theirs, the ratio, and the commit and load of the run.

    make benchmarks                          # makes the environments; then some 25 minutes on two idle cores
    make benchmarks BENCHMARKS=--small       # the rehearsal: the same commands at small sizes, which measure nothing
    python benchmarks/all.py --render        # the table again, from what was measured last

A part is one command of this folder, in the environment that it needs, in a process group of its own and under a limit
of its own. One that fails, hangs, or has no environment costs the others nothing, and stands in the table as what it
is. Every line that a command prints goes to build/benchmarks.jsonl, with its part, the commit, the load before the part
and the versions; the table between the markers of docs/benchmarks.md is drawn from that file. A rehearsal writes
build/benchmarks-small.jsonl and a table beside it, and leaves the docs alone. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: make benchmarks -->", "<!-- end: make benchmarks -->"
PEERS = str(ROOT / ".venv-peers" / "bin" / "python")
FLOWER = str(ROOT / ".venv-flower" / "bin" / "python")
VERSIONS = """
import importlib.metadata as known, json, platform, sys
names = {name: known.version(name) for name in sys.argv[1:] if any(known.distributions(name=name))}
print(json.dumps({"python": platform.python_version(), **names}))
"""
PACKAGES = ("torch", "numpy", "opacus", "tenseal", "flwr", "pfl")
COLUMNS = ("figure", "ours", "peer", "limit", "peer over ours", "commit", "load")

Line = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One row. ours, peer, limit: numbers of one unit, or what is said in their place."""

    what: str
    ours: float | str
    peer: float | str = "-"
    limit: float | str = "-"
    by: str = ""

    def cells(self) -> tuple[str, ...]:
        both = isinstance(self.ours, int | float) and isinstance(self.peer, int | float)
        ratio = shown(self.peer / self.ours) if both and self.ours else "-"  # type: ignore[operator]
        peer = f"{shown(self.peer)} ({self.by})" if self.by else shown(self.peer)
        return self.what, shown(self.ours), peer, shown(self.limit), ratio


@dataclass(frozen=True)
class Part:
    """command: program and options. small: options in the rehearsal. limit: seconds. figures: rows from its lines.
    python: what runs it. peers: the interpreter that it starts peers with, where that is another.
    """

    command: tuple[str, ...]
    small: tuple[str, ...]
    limit: int
    figures: Callable[[Sequence[Line]], Iterator[Figure]]
    python: str = sys.executable
    peers: str | None = None


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# ----------------------------------------------------------------------------------------------- rows, part by part


def of_sum(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        found = line["masked_sum_of_ten"]
        limit = 12.0 if found["length"] == 2410 else "-"
        yield Figure(f"masked sum of ten parties, d = {found['length']:,}, ms", found["median"], limit=limit)


def of_opening(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        n = line["parties"]
        last = line["opened"][-1] + line["entered_with_keys"][-1]
        yield Figure(f"opening a session of {n:,} parties in one process, s", last, limit=1.5 if n == 1000 else "-")


def of_flower(lines: Sequence[Line]) -> Iterator[Figure]:
    ours, peer = (next((line for line in lines if line["who"] == who), None) for who in ("choral", "flower"))
    if ours is None:
        return
    who = f"masked sum, {ours['parties']} parties x {ours['length']:,} values"
    for key, unit in (("cpu", "s of processor time"), ("bytes_up_per_party", "bytes up per party")):
        yield Figure(f"{who}, {unit}", ours[key], peer[key] if peer else "not there", by="Flower's SecAgg+")


def of_split(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        if line.get("what") == "BFV, split key":
            who, by = f"split key, {line['parties']:,} parties, {line['bits']} bits", "TenSEAL's CKKS"
            rate = 1 / line["peer_to_bytes"]
            yield Figure(
                f"{who}, bytes per value", line["bytes_per_value"], line["peer_bytes_per_value"], line["limit"], by
            )
            yield Figure(f"{who}, µs per value to bytes", 1 / line["to_bytes_mvalues_per_s"], rate, by=by)
        if line.get("what") == "bytes up, split key over masked":
            who = f"{line['parties']} parties, {line['length']:,} values of {line['bits']} bits"
            limit = 1.1 if line["parties"] == 50 else "-"
            yield Figure(f"split key's bytes over the masked sum's, {who}", line["ratio"], limit=limit)


def of_step(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        if "step" in line:
            over = dict(line["time over plain"])
            ours, (by, peer) = over.pop("choral"), min(over.items(), key=lambda item: item[1])
            yield Figure(f"private step over a plain one, {line['step']}", ours, peer, 1.0, by=by.capitalize())
            peaks = dict(line["peak MiB"])
            plain, mine = peaks.pop("plain"), peaks.pop("choral")
            by, peer = min(peaks.items(), key=lambda item: item[1])
            yield Figure(f"its peak memory, {line['step']}, MiB", mine, peer, plain, by=by.capitalize())


def of_rounds(lines: Sequence[Line]) -> Iterator[Figure]:
    engines = {(line["job"], line["engine"]): line for line in lines}
    for (job, engine), line in engines.items():
        if engine in ("cohort", "federate, plain sum", "resident, the user's own loop"):
            for peer in ("pfl", "flwr"):
                found = engines.get((job, peer), {"absent": "not there"})
                theirs = found["ratio_to_bare"] if "ratio_to_bare" in found else found["absent"]
                what = f"a round over a bare loop, {job}, {engine}"
                yield Figure(what, line["ratio_to_bare"], theirs, 1.0, by=peer)


def of_parties(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines[1:]:
        what = f"a round of {line['parties']:,} parties made on demand over one of {lines[0]['parties']:,}"
        yield Figure(what, line["ratio_seconds_per_round"], limit=1.0)


def of_shadows(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        what = f"{line['models']} shadow models as one stack, {line['case']}, s"
        yield Figure(what, line["stacked_s"], line["one_by_one_s"], by="one by one")


def of_own_fit(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        what = f"a round with the user's own fit over it in a bare loop, {line['job']}, {line['batches']}"
        limit = {"cnn": 1.05, "logistic": 1.1}.get(line["job"], "-")
        yield Figure(what, line["ratio"], line.get("pfl_ratio", "-"), limit, by="pfl" if "pfl_ratio" in line else "")


def of_front_door(lines: Sequence[Line]) -> Iterator[Figure]:
    for line in lines:
        limit = 0.7 if line["front door"] == "choral budget" else "-"
        yield Figure(f"{line['front door']}, s of processor time", line["seconds"], limit=limit)
        if "beyond_torch" in line:
            yield Figure("choral.Privacy beyond torch's own import, of that", line["beyond_torch"], limit=0.3)


PARTS: dict[str, Part] = {
    "sum of ten": Part(("noise_in_shares.py", "--sum"), (), 60, of_sum),
    "opening": Part(("secure_sum.py", "--opening", "--parties", "1000"), ("--parties", "60"), 120, of_opening),
    "secure sum": Part(
        ("secure_sum.py", "--json", "--parties", "50", "--length", "100000"),
        ("--parties", "5", "--length", "1000"),
        300,
        of_flower,
        FLOWER,
    ),
    "bytes": Part(("homomorphic.py", "--only", "bytes"), (), 60, of_split),
    "split key": Part(
        ("homomorphic.py", "--only", "speed"), ("--length", "100000", "--repeats", "1"), 300, of_split
    ),
    "step": Part(
        ("dp_step.py", "--only", "cnn", "transformer", "linear", "deep transformer", "resnet"),
        ("--only", "linear", "--repeats", "1"),
        1200,
        of_step,
    ),
    "rounds": Part(
        ("simulation.py", "--peer-python", PEERS),
        ("--only", "cnn", "--repeats", "1", "--scale", "0.1"),
        1500,
        of_rounds,
        peers=PEERS,
    ),
    "own fit": Part(
        ("own_fit.py", "--rounds", "8"),
        ("--only", "cnn", "--rounds", "1", "--scale", "0.02"),
        300,
        of_own_fit,
    ),
    "own fit, slices": Part(
        ("own_fit.py", "--rounds", "8", "--slices", "--peer-python", PEERS),
        ("--only", "cnn", "--rounds", "1", "--scale", "0.02"),
        300,
        of_own_fit,
        peers=PEERS,
    ),
    "front door": Part(("front_door.py",), ("--turns", "1"), 120, of_front_door),
    "parties": Part(
        ("parties.py",), ("--parties", "100", "1000", "--cohort", "10", "--rounds", "3"), 300, of_parties
    ),
    "shadows": Part(
        ("shadow.py", "--repeats", "3"), ("--models", "4", "--steps", "5", "--repeats", "1"), 300, of_shadows
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- running, drawing


def in_turn(names: Sequence[str], small: bool, out: Path) -> int:
    """Run the parts, and write their lines in place of their last ones, after each; how many did not end well."""
    failed = 0
    for name in names:
        part, load, at, begun = PARTS[name], os.getloadavg()[0], commit(), time.monotonic()
        lines, trouble = run(part, small)
        known = versions(part.python, PACKAGES) | versions(part.peers, ("flwr", "pfl"))
        facts = {"part": name, "commit": at, "load": round(load, 2), "versions": known}
        ended = {"ended": "failed" if trouble else "well", "seconds": round(time.monotonic() - begun, 1)}
        told = [{**facts, **line} for line in (*lines, {**ended, "trouble": trouble})]
        write([line for line in lines_of(out) if line["part"] != name] + told, out)
        print(json.dumps({"part": name, **ended, "trouble": trouble}), flush=True)
        failed += trouble is not None
    return failed


def write(lines: Sequence[Line], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.with_suffix(".part")
    whole.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole.replace(out)


def lines_of(out: Path) -> list[Line]:
    return [json.loads(row) for row in out.read_text().splitlines()] if out.exists() else []


def run(part: Part, small: bool) -> tuple[list[Line], str | None]:
    """What a part printed, and why it did not end well."""
    if not Path(part.python).exists():
        return [], f"there is no {Path(part.python).relative_to(ROOT)}: make benchmarks makes it"
    program, *options = part.command
    command = [part.python, str(ROOT / "benchmarks" / program), *options, *(part.small if small else ())]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        told, error = process.communicate(timeout=part.limit)
        trouble = (error.strip()[-2000:] or f"it ended with {process.returncode}") if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
        trouble = f"stopped at its limit of {part.limit} s"
    lines = [json.loads(row) for row in told.splitlines() if row.startswith("{")]
    return lines, trouble if trouble or lines else "it printed no figure"


def versions(python: str | None, packages: Sequence[str]) -> Line:
    if python is None or not Path(python).exists():
        return {}
    done = subprocess.run([python, "-c", VERSIONS, *packages], capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if not done.returncode else {}


def commit() -> str:
    """Its first seven digits, with a + where files were changed since."""
    try:
        asked = ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(lines: Sequence[Line]) -> str:
    """The rows, then what did not end well, by part."""
    rows, notes = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"], []
    for name, part in PARTS.items():
        mine = [line for line in lines if line["part"] == name]
        said, ends = [line for line in mine if "ended" not in line], [line for line in mine if "ended" in line]
        if not ends:
            notes.append(f"- **{name}** was not run.")
        elif trouble := ends[-1]["trouble"]:
            notes.append(f"- **{name}** failed: {trouble.splitlines()[-1][:200]}")
        if said:
            at = (said[0]["commit"], shown(said[0]["load"]))
            rows += [f"| {' | '.join((*figure.cells(), *at))} |" for figure in part.figures(said)]
    seen = sorted({f"{package} {number}" for line in lines for package, number in line["versions"].items()})
    return "\n".join([*rows, "", f"With {', '.join(seen)}.", *([""] if notes else []), *notes])


def render(lines: Sequence[Line], page: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table(lines)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes: a rehearsal, which leaves the docs alone")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    parser.add_argument("--render", action="store_true", help="run nothing: draw the table again")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the lines")
    wanted = parser.parse_args()
    out = wanted.out / ("benchmarks-small.jsonl" if wanted.small else "benchmarks.jsonl")
    failed = 0 if wanted.render else in_turn(wanted.only, wanted.small, out)
    lines = lines_of(out)
    if wanted.small:
        out.with_suffix(".md").write_text(table(lines) + "\n")
    else:
        PAGE.write_text(render(lines, PAGE.read_text()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
