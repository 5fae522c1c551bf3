"""Two coordinators at once, on the same data of the same sites: there is one budget, and the ledger adds up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution
from site_federation import PROMISE, Direct, Federation, approved_at, counting_code, offer_for, steps_of
from site_rounds import InRound

from choral.jobs.serving import offer_ahead, serve
from choral.jobs.settings import PrivacySettings, Settings
from choral.network import CertifiedIdentity, Offer, OfferRefusedError, SiteFolder, make_identity
from choral.network.host.host import SiteHost
from choral.network.site.budget import budget_of, open_ledger, spent_of
from choral.network.site.terms import promise_of, terms_of
from choral.protocols import TooFewSurvivorsError
from choral.trainers import Participation, RoundRecord, Run


class Other(Direct):
    """Carries the requests of the second coordinator."""

    def start(self, name: str) -> None:
        super().start(name)
        self.hosts[name] = SiteHost(SiteFolder.open(self.federation.path / name, coordinator="other"))

    def _one(self, name: str, raw: bytes, limit: int) -> memoryview:
        if self.before is not None:
            self.before(name, raw)
        reply = self.hosts[name].handle(raw, sender="other")
        assert len(reply) <= limit
        if self.after is not None:
            reply = self.after(name, reply)
        return memoryview(reply)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = Federation(tmp_path, promise=PROMISE.replace("UNIT", "record"), code=counting_code())
    other = make_identity(tmp_path / "other", "other").certificate
    for name in made.names:
        made.configure(
            name, ("[coordinators.hub]", '[coordinators.other]\naddress = "localhost:1"\n[coordinators.hub]')
        )
        folder = made.site(name)
        folder.pinned.with_(other, coordinator=True).write(folder.path / "directory.toml")
    return made


def other_hub(federation: Federation) -> CertifiedIdentity:
    return CertifiedIdentity.load(federation.path / "other", "other")


def job(federation: Federation, name: str, epsilon: float) -> Settings:
    settings = federation.settings(
        privacy=PrivacySettings(epsilon=epsilon, delta=1e-3), participation=Participation(patience=4)
    )
    return replace(settings, serve=replace(settings.serve, job=name))


def books(federation: Federation, name: str) -> tuple[int, int, float, float]:
    """Events on the site's ledger, trainings in its log, what is spent, what is promised."""
    folder = federation.site(name)
    ledger, promise = open_ledger(folder, "points"), folder.settings.data["points"].promise
    assert promise is not None
    lines = [line for line in folder.log.read().entries if line.event == "trained"]
    trained = [line for line in lines if not line.facts.get("reason")]  # a line with one says why nothing was trained
    return sum(len(events) for _, events in ledger.segments), len(trained), spent_of(ledger), promise.epsilon


def approve_both(federation: Federation, first: Settings, second: Settings) -> None:
    for name in federation.names:
        approved_at(federation, name, offer_for(federation, first))
        approved_at(federation, name, offer_ahead(second, federation.keys, coordinator="other"))


def test_a_job_does_not_go_on_after_another_has_spent_meanwhile(federation: Federation, tmp_path: Path) -> None:
    """The first is stopped after its first round, the second runs, the first would go on: what it promised, that all
    jobs together come to no more than 1 when it ends, is no longer so. No site pays or trains for it.
    """
    first, second = job(federation, "first", 1.0), job(federation, "second", 2.0)
    approve_both(federation, first, second)
    mine, others = Direct(federation), Other(federation)

    class Stopped(Exception):
        pass

    def stop(entry: RoundRecord) -> None:
        if entry.round == 1:
            raise Stopped

    def serve_first(*, resume: bool) -> Run:
        return serve(
            first, mine, federation.keys, coordinator=federation.hub, out=tmp_path / "run", resume=resume,
            say=lambda _: None, on_round=None if resume else stop,
        )  # fmt: skip

    with pytest.raises(Stopped):
        serve_first(resume=False)
    serve(second, others, federation.keys, coordinator=other_hub(federation), out=None, say=lambda _: None)
    assert [books(federation, name)[:2] for name in federation.names] == [(4, 4)] * 3
    run = serve_first(resume=True)
    assert [entry.survivors for entry in run.history] == [0, 3, 0, 0]
    assert all(entry.failed.startswith("too few sent a vector") for entry in run.history[2:])
    for name in federation.names:
        events, trained, spent, promised = books(federation, name)
        assert events == trained == 4
        assert 1.0 < spent <= 2.0 < promised
    reasons = [line.facts["reason"] for line in federation.site("north").log.read().entries if line.event == "out"]
    assert "somebody else has spent from it" in str(reasons[0])
    mine.start("north")  # made anew, it says so before it begins
    with pytest.raises(OfferRefusedError, match=r"the budget epsilon=1 at delta=0\.001 is spent"):
        federation.site("north").agree(offer_for(federation, first))


def test_two_at_once_never_spend_more_than_is_promised(federation: Federation) -> None:
    """Side by side, as it falls out: what trained is on the ledger, and what is on it is within the larger budget."""
    first, second = job(federation, "first", 1.0), job(federation, "second", 2.0)
    approve_both(federation, first, second)
    mine, others = Direct(federation), Other(federation)
    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(serve, settings, carrier, federation.keys, coordinator=hub, out=None, say=lambda _: None)
            for settings, carrier, hub in ((first, mine, federation.hub), (second, others, other_hub(federation)))
        ]
        ended = [each.exception(120) for each in done]
    assert all(error is None or isinstance(error, TooFewSurvivorsError) for error in ended), ended
    for name in federation.names:
        events, trained, spent, promised = books(federation, name)
        assert events >= trained >= 1  # paid for before it is trained
        assert 0 < spent <= 2.0 * (1 + 1e-9) < promised


def noise_of(federation: Federation, name: str, offer: Offer) -> float:
    """The noise multiplier that the officer of a site is shown before the job."""
    folder, terms = federation.site(name), terms_of(offer.terms)
    asked = promise_of(terms.privacy, len(federation.names))
    budget = budget_of(folder.settings.data["points"], open_ledger(folder, "points"), asked, terms, offer.settings)
    assert budget.noise is not None
    return budget.noise


def at_least(steps: list[tuple[float, float, int]], delta: float) -> float:
    """A lower bound on the epsilon of Gaussians, of sampling rate, noise and number each, by another accountant."""
    total = None
    for rate, noise, number in steps:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            noise, sampling_prob=rate, pessimistic_estimate=False, use_connect_dots=False,
            value_discretization_interval=1e-3,
        ).self_compose(number)  # fmt: skip
        total = one if total is None else total.compose(one)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


@pytest.mark.slow
def test_three_jobs_that_crash_cost_at_least_what_was_computed(federation: Federation, tmp_path: Path) -> None:
    """Coordinators and sites die together in the second round of each, at another message each time; the first two
    jobs are gone on with, the third is not.
    """

    class KilledError(BaseException):
        pass

    def killed() -> None:
        raise KilledError

    computed: dict[str, list[tuple[float, float, int]]] = {name: [] for name in federation.names}
    for place, (title, epsilon) in enumerate([("first", 1.0), ("second", 1.8), ("third", 2.6)]):
        settings, second = job(federation, title, epsilon), title == "second"
        hub = other_hub(federation) if second else federation.hub
        offer = offer_ahead(settings, federation.keys, coordinator=hub.name)
        before = {name: steps_of(federation, name)[0] for name in federation.names}
        for name in federation.names:
            approved_at(federation, name, offer)
        noises = {name: noise_of(federation, name, offer) for name in federation.names}

        def run(carrier: Direct, *, resume: bool, settings: Settings = settings, hub: CertifiedIdentity = hub) -> None:
            out = tmp_path / f"run-{settings.serve.job}"
            serve(settings, carrier, federation.keys, coordinator=hub, out=out, resume=resume, say=lambda _: None)

        carrier = (Other if second else Direct)(federation)
        crash = InRound(carrier, "east", 2, place + 1, killed, late=place == 0)
        with pytest.raises(KilledError):
            run(carrier, resume=False)
        assert crash.done
        if title != "third":
            run((Other if second else Direct)(federation), resume=True)
        for name in federation.names:
            steps = steps_of(federation, name)[0] - before[name]
            computed[name].append((8 / federation.records[name], noises[name], steps))
    for name in federation.names:
        steps, paid = steps_of(federation, name)
        assert 0 < steps <= paid
        folder = federation.site(name)
        truth, spent = at_least(computed[name], 1e-3), spent_of(open_ledger(folder, "points"))
        assert 1.8 < truth <= spent * (1 + 1e-6)
        assert spent <= 2.6
