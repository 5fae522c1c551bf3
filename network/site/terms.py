"""From the records in an offer back to what they are records of: training terms, a promise, a secure sum.

Read strictly: what is made is written down again, and must be what was read, every key and value. So a key that this
version does not know, or a release that its algorithm does not declare, cannot stand in an offer that is agreed to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import msgspec

from choral.errors import ChoralError
from choral.network.errors import OfferError
from choral.network.site.offer import Offer, alike
from choral.privacy import (
    AdaptiveClip,
    BandedPlan,
    ClientPrivacy,
    CorrelatedPrivacy,
    Privacy,
    SharesPlan,
    SharesTerms,
)
from choral.privacy.accounting.events import NEIGHBOURS
from choral.protocols.homomorphic.front import Homomorphic
from choral.protocols.interface import SecureSum, SumSpec
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.messages import SumSetup
from choral.protocols.plain import Plain
from choral.trainers.algorithms import KINDS
from choral.trainers.algorithms.interface import Algorithm, FederationInfo
from choral.trainers.analytics.terms import StatisticsSums, StatisticsTerms
from choral.trainers.federated.codec import Encoding
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.describe import settings_of

MOST_ROUNDS = 1 << 31
MOST_METRICS = 16
_KEYS = {"algorithm", "releases", "federation", "encoding", "privacy", "shapes", "rounds", "code"}
_ENCODING = ("value_bound", "value_bits", "weights")
T = TypeVar("T")


def terms_of(record: Mapping[str, Any]) -> TrainingTerms:
    """The training terms that an offer's record says.

    Raises: OfferError for a key or value that is not as `TrainingTerms.record` writes it.
    """
    if set(record) - {"shares", "metrics"} != _KEYS:
        raise OfferError(f"its terms have the keys {sorted(record)!s:.300}, expected {sorted(_KEYS)}")
    rounds, code, shapes, algorithm = (
        record["rounds"],
        record["code"],
        record["shapes"],
        algorithm_of(record["algorithm"]),
    )
    if type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS or not isinstance(code, str):
        raise OfferError("its terms have no number of rounds, or do not say what code is run")
    kind = StatisticsTerms if isinstance(algorithm, StatisticsSums) else TrainingTerms
    terms = kind(
        algorithm=algorithm,
        federation=_made("federation", FederationInfo, record["federation"]),
        encoding=_made("encoding", Encoding, record["encoding"]),
        privacy=record["privacy"],
        shapes=_shapes_of(shapes),
        rounds=rounds,
        code=code,
        shares=_shares_of(record["shares"]) if "shares" in record else None,
        metrics=_metrics_of(record["metrics"]) if "metrics" in record else (),
    )
    _check_federation(terms.federation)
    promise_of(terms.privacy, terms.federation.parties)
    said = msgspec.json.decode(msgspec.json.encode(terms.record()))
    for key in ("algorithm", "releases", "federation", "encoding", "shapes", "shares"):
        if not alike(record.get(key), said.get(key)):
            raise OfferError(f"its terms say other {key} than they are here: {record[key]!s:.200}")
    if isinstance(terms, StatisticsTerms):
        try:
            terms.check()
        except ChoralError as error:
            raise OfferError(f"its statistics cannot be read: {error!s:.200}") from None
    return terms


def algorithm_of(record: Any) -> Algorithm:
    """Raises: OfferError for an algorithm that is not known, or a setting that it does not have or refuses."""
    kind = (
        (KINDS | {StatisticsSums.kind: StatisticsSums}).get(str(record.get("kind")))
        if isinstance(record, dict)
        else None
    )
    if kind is None:
        raise OfferError(f"its terms have no algorithm that is known here: {record!s:.80}")
    return _made("algorithm", kind, {name: value for name, value in record.items() if name != "kind"})


def promise_of(record: Mapping[str, Any] | None, parties: int) -> Privacy | ClientPrivacy | None:
    """The promise that `settings_of` wrote. Raises: OfferError for one that it does not write."""
    if record is None:
        return None
    try:
        made = _client(record) if record.get("unit") == "client" else _record(record)
        said = settings_of(made, parties)
    except (ChoralError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise OfferError(f"its terms have a promise that cannot be read: {error!s:.200}") from None
    if said != dict(record):
        raise OfferError("its terms have a promise that sites cannot hold: only what a job file says can be offered")
    return made


def follows_of(offer: Offer, parties: int) -> tuple[Privacy, int] | None:
    """The training that statistics are offered together with: its promise for records, and its rounds; None without.

    Raises: OfferError for another promise, or one that cannot be read.
    """
    record = offer.settings.get("followed_by")
    if record is None:
        return None
    if not isinstance(record, dict) or set(record) != {"privacy", "rounds"}:
        raise OfferError("what is to follow its statistics cannot be read")
    promise, rounds = promise_of(record["privacy"], parties), record["rounds"]
    if not isinstance(promise, Privacy) or promise.noise != "local" or type(rounds) is not int:
        raise OfferError("what is to follow its statistics is no training with each site's own noise")
    if not 1 <= rounds <= MOST_ROUNDS:
        raise OfferError("what is to follow its statistics has no number of rounds")
    return promise, rounds


def sum_of(record: Mapping[str, Any]) -> SecureSum:
    """The secure sum: "kind", and the settings of that kind. Raises: OfferError."""
    kinds: dict[str, Callable[..., SecureSum]] = {"plain": Plain, "masked": Masked, "homomorphic": Homomorphic}
    kind = kinds.get(str(record.get("kind")))
    if kind is None:
        raise OfferError(f"its secure sum is of no known kind: {record.get('kind')!s:.80}")
    return _made("secure sum", kind, {name: value for name, value in record.items() if name != "kind"})


def sum_record(secure_sum: SecureSum) -> dict[str, Any]:
    """What `sum_of` reads. Raises: OfferError for a sum of the user's own.

    Four trips are not said: so every offer has the digest that it had before there were fewer.
    """
    if not isinstance(secure_sum, Plain | Masked | Homomorphic):
        raise OfferError(f"a {type(secure_sum).__name__} cannot be offered: sites know plain, masked and homomorphic")
    fields = asdict(secure_sum)
    fields.pop("block", None)  # of counts of contributors, which sites of their own refuse
    if fields.get("trips") == 4:
        del fields["trips"]
    return {"kind": secure_sum.name, **fields}


def masks_of(secure_sum: Masked | Homomorphic) -> Masked:
    """The masked sum: itself, or that of the keys, of a split one."""
    if isinstance(secure_sum, Masked):
        return secure_sum
    return Masked(
        min_survivors=secure_sum.min_survivors,
        corrupt=secure_sum.corrupt,
        dropouts=secure_sum.dropouts,
        server=secure_sum.server or "malicious",
        cohort=secure_sum.cohort,
    )


def setup_of(secure_sum: Masked | Homomorphic, parties: tuple[str, ...]) -> SumSetup:
    """What the parties would sign of a sum over all of them, but for the vector. Raises: SpecError.

    Over how few parties it may be opened, :func:`~choral.protocols.masking.ahead.floor.fewest_opened` says: in two
    trips over fewer than its min_survivors, who are asked for.
    """
    spec = SumSpec(parties=parties, length=1, bound=1, directory=len(parties))
    return masks_of(secure_sum).setup(spec, session=bytes(16))


def _record(record: Mapping[str, Any]) -> Privacy:
    given: dict[str, Any] = {
        "max_grad_norm": record["max_grad_norm"],
        "epochs": record.get("epochs", 1),
        "neighbours": record.get("neighbours", NEIGHBOURS),
        "records_per_person": record.get("records_per_person"),
        "noise": record.get("noise", "local"),
        "colluders": record.get("colluders", 1),
    }
    if "mechanism" not in record:
        return Privacy(record["epsilon"], record["delta"], **given)
    if record.get("noise") != "distributed":
        raise OfferError("its terms promise correlated noise that is all a site's own, which is for rehearsals alone")
    bands = record["bands"] or None
    return CorrelatedPrivacy(record["epsilon"], record["delta"], **given, mechanism=record["mechanism"], bands=bands)


def _client(record: Mapping[str, Any]) -> ClientPrivacy:
    clip = record["clip"]
    if "quantile" in record:
        adaptive = record["quantile"], record["clip_rate"], record["clip_share"]
        clip = AdaptiveClip(start=clip, quantile=adaptive[0], rate=adaptive[1], share=adaptive[2])
    known = ("mechanism", "bits", "min_survivors", "colluders", "noise_multiplier")
    others = {name: record[name] for name in known if name in record}
    return ClientPrivacy(record["epsilon"], record["delta"], clip=clip, noise=record["noise"], **others)


def _made(what: str, kind: Callable[..., T], fields: Any) -> T:
    """An object of a dataclass from its fields, each of the right type first: a class may compare before it checks."""
    try:
        msgspec.convert(msgspec.to_builtins(fields), kind)
        return kind(**fields)
    except (ChoralError, TypeError, ValueError) as error:  # msgspec's are ValueErrors
        raise OfferError(f"its {what} cannot be read: {error!s:.200}") from None


def _shares_of(record: Any) -> SharesPlan:
    """The plan of noise in shares; what it costs is computed anew by the party that keeps to it."""
    terms = record.get("terms") if isinstance(record, dict) else None
    what = "plan of noise in shares"
    made = _made(what, SharesTerms, terms)
    if "coefficients" in record:
        return _made(what, BandedPlan, {**record, "terms": made})
    return _made(what, SharesPlan, {**record, "terms": made})


def _metrics_of(listed: Any) -> tuple[str, ...]:
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_METRICS or len(set(map(str, listed))) < len(listed):
        raise OfferError(f"its terms have no list of 1 to {MOST_METRICS} names of evaluations")
    if any(not isinstance(name, str) or not 1 <= len(name) <= 64 for name in listed):
        raise OfferError("its terms have a name of an evaluation that is none")
    return tuple(listed)


def _shapes_of(listed: Any) -> dict[str, tuple[int, ...]]:
    try:
        pairs = msgspec.convert(listed, list[tuple[str, tuple[int, ...]]])
    except msgspec.ValidationError as error:
        raise OfferError(f"its terms have no shapes of parameters: {error!s:.200}") from None
    if not pairs or len(dict(pairs)) != len(pairs) or any(size < 1 for _, shape in pairs for size in shape):
        raise OfferError("its terms have no shapes of parameters, one twice, or one without a size")
    return dict(pairs)


def _check_federation(federation: FederationInfo) -> None:
    whole = (federation.parties, federation.length, federation.examples, federation.largest, federation.weight)
    if any(not 1 <= value < 1 << 53 for value in whole):
        raise OfferError("its terms have a number of parties, parameters, records or weights out of range")
