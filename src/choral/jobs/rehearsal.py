"""A rehearsal of a job with sites, all on one machine: `choral poc`.

rehearsal/
  job.toml           the job as it is served: its settings, with what sites agree on and where the coordinator listens
  directory.toml     the sites' certificates, pinned
  hub/               the coordinator's key and certificate
  NAME/              each site's folder, with a site.toml that agrees with the job; its own people would write it
  logs/NAME.log      what each site's process said
  run/               the run: model, history, report

Everything is as at real sites but for one thing: one user made all keys and all approvals.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.serving import refuse_table
from choral.jobs.settings import Settings, read_settings, to_json
from choral.jobs.standardising import wanted
from choral.toml_files import toml_of

if TYPE_CHECKING:
    from choral.network import Offer, SiteFolder
    from choral.trainers.data.standardised import Standardisation

HUB, HOST = "hub", "127.0.0.1"
BY, DATA = "choral poc", "records"
_APPROVED_FOR = timedelta(days=7)
_WRITTEN = (
    "# Written by `choral poc` so that it agrees with the job. At a real site its own people decide what stands here.\n"
)


@dataclass(frozen=True, kw_only=True)
class RehearsedSites:
    """The folders of one rehearsal. names: of the sites."""

    path: Path
    names: tuple[str, ...]

    @property
    def job(self) -> Path:
        return self.path / "job.toml"

    @property
    def directory(self) -> Path:
        return self.path / "directory.toml"

    @property
    def run(self) -> Path:
        return self.path / "run"

    def site(self, name: str) -> Path:
        return self.path / name

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"


def make_rehearsal(settings: Settings, path: Path, *, job: str, sites: int | None, data: Path | None) -> RehearsedSites:
    """Make all folders, and approve the job everywhere. Nothing is left behind if that cannot be done.

    job: its name, if the settings have none. sites: how many there are of a task that comes with Choral. data: of
    another one, a folder with a file or folder for each site, which is named after it.
    Raises: ConfigError, SiteError, as `serve`.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty", hint="give a new folder, or --resume to go on in this one")
    if settings.secure_sum.kind == "plain":
        raise ConfigError(
            "secure_sum.kind is plain: the coordinator would see each update, and sites send into no such sum",
            hint='[secure_sum] kind = "masked"',
        )
    refuse_table(settings)
    settings, places = _with_sites(settings, sites, data)
    shares = settings.sites
    counts = [int(place["records"]) for place in places.values()]
    settings = replace(
        settings,
        sites=replace(
            shares,
            records=sum(counts) if shares.records is None else shares.records,
            largest=max(counts) if shares.largest is None else shares.largest,
        ),
        serve=replace(
            settings.serve,
            job=settings.serve.job or job,
            identity=(path / HUB / f"{HUB}.crt").absolute(),
            host=HOST,
            rehearsal=True,
        ),
    )
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        return _lay_out(settings, RehearsedSites(path=path, names=tuple(places)), places)
    except BaseException:
        for part in (path,) if made else path.iterdir():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        raise


def reopen_rehearsal(settings: Settings, path: Path) -> RehearsedSites:
    """The rehearsal that the folder holds, at a port that is free now, its job approved for some days more.

    Raises: ConfigError for a folder without one, or with one of other settings.
    """
    from choral.network.site.files.directory import Pinned

    job = path / "job.toml"
    if not job.is_file():
        raise ConfigError(f"{path} holds no rehearsal to go on with", hint="leave out --resume to begin one")
    kept = read_settings(job, Settings)
    wanted = replace(
        _for_sites(settings),
        sites=kept.sites,
        serve=kept.serve,
        split=replace(settings.split, parties=kept.split.parties),
    )
    if wanted != kept:
        raise ConfigError(f"{path} holds a rehearsal of another job", hint=f"compare with {job}, or give a new folder")
    names = tuple(certificate.name for certificate in Pinned.read(path / "directory.toml").sites)
    rehearsal, port = RehearsedSites(path=path, names=names), _free_port()
    _write_job(replace(kept, serve=replace(kept.serve, port=port)), job)
    for name in names:
        text = (toml := rehearsal.site(name) / "site.toml").read_text()
        toml.write_text(text.replace(f'"{HOST}:{kept.serve.port}"', f'"{HOST}:{port}"'))
        folder = _opened(rehearsal, name)
        for offer in folder.offers.all():
            _approve(folder, offer)
    return rehearsal


def gather_receipts(rehearsal: RehearsedSites) -> None:
    """Copy the sites' receipts of the run into its folder, where those of a rehearsal in one process are.

    Between real sites nobody could: each has its own.
    """
    from choral.trainers.run_folder.evidence.manifest import NAME
    from choral.trainers.run_folder.evidence.receipts import receipts_path

    if not (manifest := rehearsal.run / NAME).is_file():
        return
    job = json.loads(manifest.read_bytes())["manifest"]["run"]
    for name in rehearsal.names:
        if (theirs := receipts_path(rehearsal.site(name), job)).is_file():
            target = receipts_path(rehearsal.run, name)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(theirs, target)


def ledger_of(rehearsal: RehearsedSites, name: str) -> tuple[float, float] | None:
    """What a site's ledger says is spent, and what its data promises; None without a promise. Raises: LedgerError."""
    from choral.network.site.budget import open_ledger, spent_of

    folder = _opened(rehearsal, name)
    promise = folder.settings.data[DATA].promise
    return None if promise is None else (spent_of(open_ledger(folder, DATA)), promise.epsilon)


def _with_sites(settings: Settings, sites: int | None, data: Path | None) -> tuple[Settings, dict[str, dict[str, Any]]]:
    """The settings; of each site where its data lies and how many records it has. Raises: ConfigError, TaskError."""
    from choral.network.host.training_code import code_digest, site_task
    from choral.trainers.data import TASKS

    settings = _for_sites(settings)
    if settings.task in TASKS:
        if data is not None:
            raise ConfigError(f"--data goes with training code in a file; {settings.task} comes with its data")
        count = 3 if sites is None else sites
        settings = replace(settings, split=replace(settings.split, parties=count))
        parts = TASKS[settings.task](settings.split, settings.training, settings.seed, None).parties.values()
        count = len(parts)  # with a key the data says how many
        return settings, {
            f"site-{number}": {"part": f"party {number} of {count}", "records": len(part)}
            for number, part in enumerate(parts, 1)
        }
    if data is None or not data.is_dir():
        raise ConfigError(
            f"where is the data of each site, for {Path(settings.task).name}?",
            hint="--data DIR: a folder with a file or a folder for each site, named after it",
        )
    entries = {entry.stem: entry.absolute() for entry in sorted(data.iterdir()) if not entry.name.startswith(".")}
    if sites not in (None, len(entries)):
        raise ConfigError(f"{data} has data of {len(entries)} sites ({', '.join(entries)}), and --sites says {sites}")
    code = Path(settings.task)
    digest, found = code_digest(code), {}
    for name, entry in entries.items():
        _, records = site_task(code, digest, entry, settings.training, settings.seed)
        found[name] = {"path": str(entry), "records": len(records)}
    return settings, found


def _for_sites(settings: Settings) -> Settings:
    """What of the settings a coordinator of sites takes, the path of the task from anywhere."""
    from choral.trainers.data import TASKS

    task = settings.task if settings.task in TASKS else str(Path(settings.task).absolute())
    evaluation = replace(settings.evaluation, per_party=False)  # needs each party's records, which stay at its site
    return replace(settings, task=task, evaluation=evaluation, arms={})


def _lay_out(settings: Settings, rehearsal: RehearsedSites, places: Mapping[str, Mapping[str, Any]]) -> RehearsedSites:
    from choral.jobs.serving import offer_ahead
    from choral.network import SiteFolder, make_identity
    from choral.network.site.files.directory import Pinned
    from choral.network.site.files.private import write_private

    settings = replace(settings, serve=replace(settings.serve, port=_free_port()))
    _write_job(settings, rehearsal.job)
    (rehearsal.path / "logs").mkdir(mode=0o700)
    hub = make_identity(rehearsal.path / HUB, HUB).certificate
    certificates = {name: SiteFolder.init(rehearsal.site(name), name).identity.certificate for name in rehearsal.names}
    everybody = Pinned()
    for certificate in certificates.values():
        everybody = everybody.with_(certificate)
    everybody.write(rehearsal.directory)
    keys = {name: certificate.public_key for name, certificate in certificates.items()}
    first = offer_ahead(settings, keys, coordinator=HUB)
    offer = offer_ahead(settings, keys, coordinator=HUB, by=_stand_in(settings)) if wanted(settings) else first
    for name in rehearsal.names:
        site = rehearsal.site(name)
        everybody.without(name).with_(hub, coordinator=True).write(site / "directory.toml")
        if not offer.embedded:
            write_private(site / "tasks" / offer.task, Path(settings.task).read_bytes())
        table = _site_table(name, offer, places[name], settings.serve.port, first=first is not offer)
        write_private(site / "site.toml", (_WRITTEN + toml_of(table)).encode())
        folder = _opened(rehearsal, name)
        folder.offers.keep(first)
        _approve(folder, first)
    return rehearsal


def approve_training(rehearsal: RehearsedSites) -> bool:
    """Approve the training of a job whose means and deviations are there now, everywhere; whether there are any.

    Raises: ConfigError if a site would refuse all the same.
    """
    from choral.jobs.serving import offer_ahead
    from choral.jobs.standardising import kept
    from choral.network.site.files.directory import Pinned

    settings = read_settings(rehearsal.job, Settings)
    if (by := kept(settings, rehearsal.run)) is None:
        return False
    keys = {each.name: each.public_key for each in Pinned.read(rehearsal.directory).sites}
    offer = offer_ahead(settings, keys, coordinator=HUB, by=by)
    for name in rehearsal.names:
        folder = _opened(rehearsal, name)
        folder.offers.keep(offer)
        _approve(folder, offer)
    return True


def _stand_in(settings: Settings) -> Standardisation:
    """In the place of what is not known yet: a site's terms do not depend on it."""
    from choral.jobs.serving import coordinators_task
    from choral.trainers.data.standardised import Standardisation, bounds_of_features

    return Standardisation.none(len(bounds_of_features(coordinators_task(settings)[0])))


def _opened(rehearsal: RehearsedSites, name: str) -> SiteFolder:
    from choral.network import SiteFolder

    return SiteFolder.open(rehearsal.site(name), coordinator=HUB)


def _approve(folder: SiteFolder, offer: Offer) -> None:
    """Raises: ConfigError if the site would refuse all the same."""
    from choral.network.site.approvals import approve
    from choral.network.site.objections import objections

    if against := objections(folder, offer, budget=False):
        raise ConfigError(f"{folder.settings.name} would refuse this job: {'; '.join(against)}")
    approve(folder, offer, (datetime.now(UTC) + _APPROVED_FOR).date(), by=BY)


def _site_table(name: str, offer: Offer, place: Mapping[str, Any], port: int, *, first: bool) -> dict[str, Any]:
    """A site.toml that agrees with the offer, and with nothing weaker. first: with one of statistics before it, too."""
    from choral.network.site.terms import terms_of

    terms = terms_of(offer.terms)
    encoding, federation = terms.encoding, terms.federation
    return {
        "name": name,
        "rehearsal": True,
        "coordinators": {HUB: {"address": f"{HOST}:{port}"}},
        "sum": {
            **_sum_table(offer),
            "value_bound": encoding.value_bound,
            "value_bits": encoding.value_bits,
            "maximum_weight": federation.largest,
        },
        "job": {
            "algorithms": [terms.algorithm.kind, *(["statistics"] if first else [])],
            "releases": sorted({"fit", "derived", *(release.source for release in terms.algorithm.releases)}),
            "metrics": offer.metrics,
        },
        "maxima": {"rounds": terms.rounds, "parameters": federation.length, "jobs_a_day": 1000},
        "data": {DATA: {**place, **_promise_table(offer, shares=first)}},
        "tasks": {offer.task: {"data": DATA}},
    }


def _sum_table(offer: Offer) -> dict[str, Any]:
    from choral.network.site.terms import setup_of, sum_of
    from choral.protocols.homomorphic.front import Homomorphic
    from choral.protocols.masking.ahead.floor import promised
    from choral.protocols.masking.masked import Masked

    summing, parties = sum_of(offer.secure_sum), len(offer.parties)
    if isinstance(summing, Homomorphic) and summing.key == "shared":
        fewest = summing.min_survivors or parties // 2 + 1
        return {"kinds": [summing.name], "corrupt": 0, "minimum_cohort": fewest, "server": "semi-honest"}
    if not isinstance(summing, Masked | Homomorphic):
        raise ConfigError(f"sites send into no {summing.name} sum")
    setup = setup_of(summing, offer.parties)
    return {
        "kinds": [summing.name],
        "corrupt": setup.corrupt,
        "minimum_cohort": promised(setup, summing.min_survivors),
        "minimum_threshold": max(2, setup.threshold),
        "server": setup.server,
        "security_bits": min(40, setup.security_bits),
    }


def _promise_table(offer: Offer, *, shares: bool) -> dict[str, Any]:
    from choral.network.site.objections import clip_of
    from choral.network.site.terms import promise_of
    from choral.privacy import Privacy

    promise = promise_of(offer.terms["privacy"], len(offer.parties))
    if promise is None:
        return {"without_privacy": True}
    table = {
        "epsilon": promise.epsilon,
        "delta": promise.delta,
        "max_grad_norm": clip_of(promise),
        "noise": [promise.noise, *(["distributed"] if shares else [])],
        "colluders": promise.colluders,
    }
    if isinstance(promise, Privacy):
        return {"promise": {**table, "unit": "record", "neighbours": promise.neighbours}}
    return {"promise": {**table, "unit": "client"}}


def _write_job(settings: Settings, path: Path) -> None:
    path.write_text(toml_of(_changed(to_json(settings), to_json(Settings()))), encoding="utf-8")


def _changed(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the usual settings, as a table."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(usual.get(key), Mapping):
            if part := _changed(value, usual[key]):
                found[key] = part
        elif key not in usual or value != usual[key]:
            found[key] = value
    return found


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])
