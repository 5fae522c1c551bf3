"""What noise in shares is refused for: every refusal by its words, before anything is trained, paid for or sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from choral import ClientPrivacy, Homomorphic, Masked, Participation, Plain, Privacy, federate
from choral.errors import ConfigError
from choral.privacy import PrivacyError, SharesTerms, plan_shares
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SumResult
from choral.trainers import (
    DANE,
    FSVRG,
    GD,
    CoCoA,
    Dropouts,
    FedAdam,
    FedAvg,
    FedNova,
    FedProx,
    FedSGD,
    FedYogi,
    Scaffold,
    Task,
)
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.record_shares.checks import check_processes
from choral.trainers.federated.record_shares.codec import SharesCodec

PROMISE = Privacy(4.0, 1e-4, noise="distributed")
SUM = Masked(corrupt=1, dropouts=1, min_survivors=4)
STEPS = FedSGD(batch_size=40, steps_per_round=3)
PARTIES = ("north", "south", "east", "west", "middle")
Make = Callable[..., Task]


def planned(task: Task, **changes: Any) -> Plan:
    given: dict[str, Any] = {"rounds": 2, "algorithm": STEPS, "privacy": PROMISE, "secure_sum": SUM}
    return Plan.of(task, **given | changes)


@pytest.mark.parametrize(
    "algorithm",
    [FedAvg(), FedProx(mu=0.1), Scaffold(), FedAdam(), FedYogi(), FedNova(max_steps=10, reference=5), FSVRG(), DANE()],
    ids=lambda algorithm: algorithm.kind,
)
def test_several_local_steps_are_refused_with_the_reason(task: Make, algorithm: Any) -> None:
    planned(task())
    with pytest.raises(ConfigError, match=f"^{algorithm.kind} with .*several local steps would promise more") as error:
        planned(task(), algorithm=algorithm)
    assert "FedSGD" in str(error.value.hint)


def test_dual_ascent_is_refused_by_name(task: Make) -> None:
    with pytest.raises(ConfigError, match=r"^cocoa with .*several local steps"):
        planned(task(), algorithm=CoCoA(ridge=0.1))


@pytest.mark.parametrize("algorithm", [FedSGD(), GD()], ids=lambda algorithm: algorithm.kind)
def test_noise_of_each_partys_own_is_refused_where_it_would_not_cover_the_sums(task: Make, algorithm: Any) -> None:
    with pytest.raises(ConfigError, match=f"{algorithm.kind} also releases") as error:
        planned(task(), algorithm=algorithm, privacy=Privacy(4.0, 1e-4))
    assert 'noise="distributed"' in str(error.value.hint)


def test_a_shared_key_is_refused(task: Make) -> None:
    planned(task(), secure_sum=Homomorphic(corrupt=1, dropouts=1, min_survivors=4))
    with pytest.raises(ConfigError, match="under a shared key: any one party opens"):
        planned(task(), secure_sum=Homomorphic(key="shared"))


@pytest.mark.parametrize("colluders", [0, -1, True, 1.5])
def test_no_colluder_is_no_promise(colluders: Any) -> None:
    with pytest.raises(ConfigError, match="colluders is"):
        Privacy(4.0, 1e-4, noise="distributed", colluders=colluders)


def test_a_sum_that_withstands_fewer_than_the_colluders_is_refused(task: Make) -> None:
    two = Privacy(4.0, 1e-4, noise="distributed", colluders=2)
    planned(task(), privacy=two, secure_sum=Masked(corrupt=2, dropouts=0, min_survivors=5))
    with pytest.raises(ConfigError, match="withstands 1 corrupt parties, and the noise 2 colluders"):
        planned(task(), privacy=two)


def test_a_sum_without_an_honest_survivor_is_refused(task: Make) -> None:
    many = Privacy(4.0, 1e-4, noise="distributed", colluders=2)
    with pytest.raises(ConfigError, match="opened over 2 parties, of which 2 may be colluders"):
        planned(task(), privacy=many, secure_sum=Plain(), participation=Participation(least=2))
    with pytest.raises(ConfigError, match=r"participation\.least is 9 of 5"):
        planned(task(), secure_sum=Plain(), participation=Participation(least=9))


def test_cohorts_and_several_processes_are_refused(task: Make) -> None:
    with pytest.raises(ConfigError, match="needs every party in every step"):
        planned(task(), participation=Participation(cohort=4))
    with pytest.raises(ConfigError, match="by one process"):
        check_processes(PROMISE)
    check_processes(Privacy(4.0, 1e-4))
    check_processes(ClientPrivacy(4.0, 1e-4))


def test_a_batch_of_more_records_than_there_are_is_refused(task: Make) -> None:
    with pytest.raises(ConfigError, match="batch_size is 161, and all parties together have 160"):
        federate(task(), rounds=1, algorithm=FedSGD(batch_size=161), privacy=PROMISE, secure_sum=SUM)
    with pytest.raises(ConfigError, match="batch_size is 161, and all parties together have 160"):
        federate(task(), rounds=1, algorithm=FedSGD(batch_size=161))


def test_a_sum_that_is_tried_again_without_paying_is_refused(task: Make) -> None:
    patient = Participation(patience=2)
    planned(task(), participation=patient)  # each sum is paid for
    with pytest.raises(ConfigError, match="fedsgd has several sums in a round"):
        planned(task(), privacy=None, participation=patient)


def codec() -> SharesCodec:
    terms = SharesTerms(
        records=160, batch_size=40, steps=6, parties=5, min_survivors=4, length=12, most_records=60
    )  # fmt: skip
    return SharesCodec(PARTIES, plan_shares(PROMISE, terms))


def test_each_session_is_held_against_the_plan() -> None:
    """The noise is sized for three honest survivors and one colluder: nothing weaker is sent into."""
    made = codec()
    made.check(SUM.open(made.spec))
    made.check(Homomorphic(corrupt=1, dropouts=1, min_survivors=4).open(made.spec))
    made.check(Plain().open(made.spec))  # with a claim for outsiders

    def stating(**statement: Any) -> Any:
        return type("Session", (), {"statement": {"name": "other"} | statement})()

    made.check(stating(parties=5, min_survivors=4, corrupt=1))
    with pytest.raises(PrivacyError, match="opened over 3 parties, and the noise is sized for 4"):
        made.check(stating(parties=5, min_survivors=3, corrupt=1))
    with pytest.raises(PrivacyError, match="withstands 0 corrupt"):
        made.check(stating(parties=5, min_survivors=4, corrupt=0))
    with pytest.raises(PrivacyError, match="of 6 parties"):
        made.check(stating(parties=6, min_survivors=4, corrupt=1))
    with pytest.raises(PrivacyError, match="opened over 0 parties"):
        made.check(stating())  # it does not say
    with pytest.raises(ConfigError, match="shared key"):
        made.check(stating(parties=5, min_survivors=4, corrupt=1, key="shared"))


def test_only_a_vector_with_noise_is_sent() -> None:
    made = codec().party(41)
    assert made.encode(torch.zeros(12, dtype=torch.int64)).vector.dtype == torch.int64
    for vector in (torch.zeros(12), torch.zeros(11, dtype=torch.int64), torch.zeros(12, dtype=torch.int32)):
        with pytest.raises(PrivacyError, match="expected the int64 vector with its share of the noise"):
            made.encode(vector)


def test_too_few_survivors_are_refused_before_and_after() -> None:
    made = codec()
    made.begin(PARTIES[:4], bytes(32))
    with pytest.raises(TooFewSurvivorsError, match="3 of 5 parties are left, and the noise is sized for 4"):
        made.begin(PARTIES[:3], bytes(32))
    opened = SumResult(total=np.zeros(12, np.int64), survivors=PARTIES[:3], bytes_up={}, bytes_down={})
    with pytest.raises(TooFewSurvivorsError, match="3 of 5"):
        made.decode(opened)


def test_four_of_ten_dropped_out_and_nothing_is_opened_or_paid_for(task: Make) -> None:
    """40 per cent drop out before their vector, by a seed for which it is so."""
    parties = {f"p{n}": dataset for n, dataset in enumerate([*task().parties.values()] * 2)}
    lossy = Participation(dropouts=Dropouts(vector=0.4), draw="seed")
    opened: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharesCodec, "decode", lambda self, result: opened.append(result))
        made = Masked(corrupt=1, dropouts=1, min_survivors=9)
        with pytest.raises(TooFewSurvivorsError, match="of 10 parties are left, and the noise is sized for 9"):
            federate(
                task(), parties, rounds=1, algorithm=STEPS, privacy=PROMISE, secure_sum=made, participation=lossy
            )  # fmt: skip
    assert not opened
