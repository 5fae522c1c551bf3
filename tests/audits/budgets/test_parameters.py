"""A ledger in the parameters of other definitions, against closed forms that share no code with the accountants."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import dp_accounting
import msgspec
import pytest

from choral.audits import Audit, audit
from choral.audits.budgets.parameters import parameters_of
from choral.audits.findings.parameters import PromiseParameters, lattice_of
from choral.audits.report.reader.parameters import lattice_words, parameter_rows
from choral.privacy import Ledger
from choral.privacy.accounting.events import ClientRelease, PoissonSampledGaussian, RecordEvent, Search
from choral.privacy.ledgers.spending import spent_by_clients, spent_by_records
from choral.trainers import Run
from choral.trainers.run_folder.folder import ledger_file

DELTA = 1e-4


def run_of(make_run: Callable[..., Run], folder: Path, event: RecordEvent, **changes: object) -> Run:
    (folder / "ledger").mkdir()
    ledger = Ledger(ledger_file(folder / "ledger", "pooled"))
    ledger.bind("pooled", DELTA)
    ledger.append(event, after=0)
    spent = spent_by_records(ledger, DELTA, changes.pop("records_per_person", None))  # type: ignore[arg-type]
    privacy = {"epsilon": 20.0, "delta": DELTA}
    run = make_run("cloud-dp", parties={"all": 1000}, spent={"pooled": spent}, privacy=privacy, **changes)
    return Run(info=run.info, history=run.history, state=run.state, folder=folder)


def found(run: Run) -> PromiseParameters:
    parameters = parameters_of(run)
    assert parameters is not None
    return parameters


def test_of_a_gaussian_on_all_records_they_are_the_textbook_ones(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """mu = sqrt(T) / sigma (Dong, Roth, Su 2022), rho = T / (2 sigma^2) and Renyi a rho (Bun and Steinke 2016), epsilon
    by Balle and Wang's exact trade-off."""
    steps, noise = 25, 8.0
    one = found(
        run_of(make_run, tmp_path, PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=noise, steps=steps))
    )
    assert one.mu == pytest.approx(math.sqrt(steps) / noise)
    assert one.rho == pytest.approx(steps / (2 * noise**2))
    for each in one.renyi:
        assert each.divergence == pytest.approx(each.order * steps / (2 * noise**2), rel=1e-6)
    assert [each.delta for each in one.at] == [1e-4, 1e-5, 1e-6]  # 1/n^2 is 1e-6
    for each in one.at:
        exact = dp_accounting.get_epsilon_gaussian(noise / math.sqrt(steps), each.delta)
        assert each.epsilon == pytest.approx(exact, rel=1e-6)
    assert one.person is None


def test_drawing_is_in_renyi_and_not_in_rho(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """Order 2 of the Poisson-sampled Gaussian, T log(1 + q^2 (e^(1/sigma^2) - 1)), is an integral done by hand."""
    q, noise, steps = 0.05, 2.0, 100
    run = run_of(
        make_run, tmp_path, PoissonSampledGaussian(sample_rate=q, noise_multiplier=noise, steps=steps),
        records_per_person=3,
    )  # fmt: skip
    one = found(run)
    second = next(each for each in one.renyi if each.order == 2.0)
    assert second.divergence == pytest.approx(steps * math.log1p(q**2 * math.expm1(1 / noise**2)), rel=1e-6)
    assert one.rho == pytest.approx(steps / (2 * noise**2))
    epsilon = run.info.spent["pooled"].epsilon
    assert one.person is not None
    assert one.person.epsilon == pytest.approx(3 * epsilon)
    assert one.person.delta == pytest.approx(DELTA * (1 + math.exp(epsilon) + math.exp(2 * epsilon)))
    rows = dict(parameter_rows(one))
    assert "ε" in rows["For a person with up to 3 records"]
    report = audit(run)
    assert report.parameters == one
    path = report.save(tmp_path / "report.json")
    assert Audit.load(path).parameters == one
    for name in ("card.md", "page.html"):
        words = report.save(tmp_path / name).read_text("utf-8")
        assert "zero-concentrated" in words
        assert "For a person with up to 3 records" in words


def test_what_has_no_such_parameter_has_none(make_run: Callable[..., Run], tmp_path: Path) -> None:
    tried = (PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=2.0, steps=10),)
    search = Search(tries=tried, mean=2.0)
    one = found(run_of(make_run, tmp_path, search))
    assert (one.rho, one.mu, one.renyi) == (None, None, ())
    assert one.at
    assert parameters_of(make_run("federated-dp")) is None  # no ledgers
    assert parameters_of(make_run("federated")) is None


def test_of_clients_with_integer_noise_there_is_the_renyi_curve(make_client_run: Callable[..., Run]) -> None:
    ledger = Ledger()
    ledger.bind("clients", 1e-5, unit="client")
    release = ClientRelease(
        mechanism="discrete_gaussian", sensitivity_squared=10_000, share_variance=10_000.0, shares=100, length=1024
    )
    ledger.append(release, after=0)
    run = make_client_run()
    spent = {"clients": spent_by_clients(ledger, 1e-5)}
    info = msgspec.structs.replace(run.info, spent=spent)
    one = found(Run(info=info, history=run.history, state=run.state, ledgers={"clients": ledger.written()}))
    assert (one.rho, one.mu) == (None, None)
    assert one.renyi[0].divergence == pytest.approx(1.5 * 10_000 / (2 * 1_000_000), rel=1e-3)
    assert 0.01 in [each.delta for each in one.at]  # ten clients: 1/n^2


def test_a_lattice_has_its_published_estimates() -> None:
    """The figures of docs/homomorphic.md, by the lattice estimator; the tests' own, of primal and dual attacks, agree
    with the most careful count to 1.5 bits (tests/protocols/homomorphic/split/test_lattice_security.py)."""
    split = lattice_of({"key": "split", "ring_degree": 4096, "coefficient_modulus_bits": 100})
    assert split is not None
    assert (split.classical, split.core_svp, split.quantum, split.version) == (131.5, 102.2, 90.0, "27a581b")
    page = (Path(__file__).resolve().parents[3] / "docs/homomorphic.md").read_text("utf-8")
    for degree, bits in ((2048, 53), (4096, 106), (8192, 212)):
        each = lattice_of({"key": "split", "ring_degree": degree, "coefficient_modulus_bits": bits})
        assert each is not None
        shown = f"| {degree}, {bits} | {each.classical:g}"
        assert shown in page
        assert f"| {each.core_svp:.1f} | {each.quantum:.1f} |" in page
    shared = lattice_of({"key": "shared", "ring_degree": 4096, "coefficient_modulus_bits": 72})
    assert shared is not None
    assert (shared.classical, shared.quantum) == (128.0, 128.0)
    wider = lattice_of({"key": "shared", "ring_degree": 4096, "coefficient_modulus_bits": 109})
    assert wider is not None
    assert wider.quantum is None
    assert "no figure against a quantum computer" in lattice_words(wider)
    assert "commit" not in lattice_words(split)
    assert lattice_of({"name": "masked"}) is None
    assert lattice_of(None) is None
    assert lattice_of({"key": "split", "ring_degree": 4096, "coefficient_modulus_bits": 107}) is None  # beyond them
