"""The command ``choral stats``: statistics of parties' records in one secure sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from choral.cli.arguments import parse_with_config
from choral.jobs.statistics import StatisticsSettings, run_statistics
from choral.toml_files import read_toml


@dataclass(frozen=True, kw_only=True)
class StatsFlags:
    """Count, mean, variance, covariance, histogram, quantiles, tables of parties' records, in one secure sum.

    With privacy.epsilon: noise in shares for each record (or, privacy.unit client, for each party), paid for in the
    parties' ledgers. Without: exact. With --out: statistics.json, statistics.html and the ledgers.

    Every key of CONFIG is a flag of the same name below; the flag wins.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the settings, e.g. examples/hospitals/statistics.toml."""
    out: Path | None = None
    """Folder for the results."""
    quiet: bool = False
    """Print nothing but errors."""
    settings: Annotated[StatisticsSettings, tyro.conf.arg(name="")] = field(default_factory=StatisticsSettings)


def stats(words: list[str]) -> int:
    wanted = parse_with_config("stats", words, StatsFlags, _read)
    out = wanted.out
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    found = run_statistics(wanted.settings, base=wanted.config.parent, out=out)
    if out is not None:
        found.save(out / "statistics.json")
        found.save(out / "statistics.html")
    if not wanted.quiet:
        print(found.table())
        if out is not None:
            print(f"statistics: {out / 'statistics.json'}, {out / 'statistics.html'}")
    return 0


def _read(path: str) -> StatisticsSettings:
    keys = "`choral stats --help` lists every key with its type"
    return read_toml(path, StatisticsSettings, example="examples/hospitals/statistics.toml", keys=keys)
