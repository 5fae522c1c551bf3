"""The command ``choral stats``: statistics of parties' records in one secure sum."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from choral.cli.arguments import parse_with_config
from choral.jobs.statistics import StatisticsSettings, run_statistics
from choral.toml_files import read_toml

if TYPE_CHECKING:
    from choral.trainers.analytics.result import FederatedStatistics


@dataclass(frozen=True, kw_only=True)
class StatsFlags:
    """Count, mean, variance, covariance, histogram, quantiles, tables of parties' records, in one secure sum.

    With --directory the parties are sites at their own machines, whose people approve the offer (--offer writes it).
    They compute from the CSV file that their site.toml has under [tasks.statistics].

    With privacy.epsilon: noise in shares for each record (or, privacy.unit client, for each party), paid for in the
    parties' ledgers. Without: exact. With --out: statistics.json, statistics.html and the ledgers.

    Every key of CONFIG is a flag of the same name below; the flag wins.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the settings, e.g. examples/hospitals/statistics.toml."""
    out: Path | None = None
    """Folder for the results."""
    directory: Path | None = None
    """The sites' pinned certificates, as `choral site directory` writes it."""
    offer: Path | None = None
    """With --directory: write the offer to this file, for sites to review, and do nothing else."""
    json: bool = False
    """Print the statistics as JSON, as in statistics.json, and nothing else."""
    quiet: bool = False
    """Print nothing but errors."""
    settings: Annotated[StatisticsSettings, tyro.conf.arg(name="")] = field(default_factory=StatisticsSettings)


def stats(words: list[str]) -> int:
    wanted = parse_with_config("stats", words, StatsFlags, _read)
    out = wanted.out
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if wanted.directory is not None:
        found = _at_sites(wanted, wanted.directory)
    else:
        found = run_statistics(wanted.settings, base=wanted.config.parent, out=out)
        if out is not None:
            found.save_in(out)
    if found is None:
        return 0
    if wanted.json:
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
    elif not wanted.quiet:
        print(found.table())
        if out is not None:
            print(f"statistics: {out / 'statistics.json'}, {out / 'statistics.html'}")
    return 0


def _at_sites(wanted: StatsFlags, directory: Path) -> FederatedStatistics | None:
    """None where the offer alone was asked for. Raises: as `choral serve`."""
    from choral.cli.sites.serve import coordinator_of, listening, write_offer
    from choral.jobs.sites.statistics import serve_statistics, statistics_offer

    settings = wanted.settings
    if not settings.serve.job:
        settings = replace(settings, serve=replace(settings.serve, job=wanted.config.stem))
    identity, sites = coordinator_of(settings.serve, directory)
    keys = {certificate.name: certificate.public_key for certificate in sites}
    if wanted.offer is not None:
        write_offer(statistics_offer(settings, tuple(keys), coordinator=identity.name), wanted.offer)
        return None
    with listening(settings.serve, identity, sites, quiet=wanted.quiet) as (hub, say):
        return serve_statistics(settings, hub, keys, coordinator=identity, say=say, out=wanted.out)


def _read(path: str) -> StatisticsSettings:
    keys = "`choral stats --help` lists every key with its type"
    return read_toml(path, StatisticsSettings, example="examples/hospitals/statistics.toml", keys=keys)
