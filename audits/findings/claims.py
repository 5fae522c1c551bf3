"""The claim of a run in words: unit, neighbours, adversary, epsilon, delta, accountant; and what qualifies it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from choral.audits.findings.schema import Claim
from choral.audits.findings.text import cost, is_gap, power
from choral.audits.findings.whole import Composed
from choral.errors import DataError
from choral.privacy.accounting.events import REPLACE_ONE, ZERO_OUT, relation_of, stated
from choral.privacy.ledgers.spent import Spent, group_pair

if TYPE_CHECKING:
    from choral.trainers.run_folder.info import RunInfo

_INCOMPLETE = "the run was edited or is incomplete"
_MEANING = {
    ZERO_OUT: " (one record is replaced by an empty one, which adds zero to every step)",
    REPLACE_ONE: " (one record is replaced by any other)",
}
_SURVIVORS = "which of them survive each round"
_PUBLIC = {
    "record": (
        "how many records each data owner has",
        "the batch size, and so the sampling rate, the number of steps and the noise",
    ),
    "client": (
        "who the clients are, and so how many",
        _SURVIVORS,
        "how many records each has, where the run lists it",
    ),
}
_CAVEATS_ALWAYS = (
    "Example counts, party names and party sizes are treated as public.",
    "The evaluation data is taken to be public or disjoint from the training data: what is measured on it is published"
    " without noise.",
)
_CAVEATS_PRIVATE = (
    "Each epsilon is that of one run alone. Publishing several runs on the same records (several seeds, several"
    " budgets, or a choice made by looking at them) costs the composition of all of them.",
    "A record that two parties hold is spent at both: its epsilon is at most the sum of the two.",
    "The guarantee covers what was noised. Normalisation statistics, model choice and tuning on the same records are"
    " outside it.",
)
_CAVEATS_CLIENT = (
    "Noise that hides a client is of the size of one client's whole update, and only the number of clients makes it"
    " small beside their mean: privacy for each client takes hundreds of them. With a handful, little more than chance"
    " is left.",
)
_CAVEATS_MIXED = (
    "An ε per client and an ε per record are different promises, on no common scale. The first hides all that a client"
    " holds, the second one record of it, and k records of one client at k times ε and a δ that grows by e^((k-1) ε)"
    " only. At equal ε, the configuration per client promises more.",
)
_CAVEATS_GAP = (
    "A gap to the least value of the objective is computed on the training records and published without noise. No ε"
    " here covers that: do it for public data only.",
)
_CAVEATS_SITES = (
    "The parties are at sites of their own. How many records they have was agreed on beforehand, and not counted here.",
    "Each site keeps the ledger of its data, and it alone can recompute what was spent: this folder has none of them.",
)
_CAVEATS_COMPARED = (
    "Each interval is at 95 % by itself, without correction for looking at several configurations, and takes seeds to"
    " be near normal, which few seeds cannot show.",
    "Intervals are over seeds only (initial weights, data order, noise). They say nothing about another split, another"
    " test set or another task.",
    "Seconds are those of the machine that ran the configurations: one party after another, perhaps with other runs"
    " beside it. Parties that work at the same time over a network would take other times.",
)


def check_costs(info: RunInfo, what: str) -> None:
    """Raises: DataError for a promise or a cost that is not a number in range; ``what`` names the run."""
    for name, most in (("epsilon", math.inf), ("delta", 1.0)):
        promised = float((info.privacy or {name: 0.5}).get(name, math.nan))
        if not (0 < promised < most):
            raise DataError(f"{what}: promises {name} = {promised}, expected 0 < {name} < {most:g}", hint=_INCOMPLETE)
        for holder, spent in info.spent.items():
            if not 0 <= getattr(spent, name) < most:
                said = f"{name} spent by {holder} is {getattr(spent, name)}"
                raise DataError(f"{what}: {said}, expected 0 <= {name} < {most:g}", hint=_INCOMPLETE)


def sentence_parts(info: RunInfo) -> tuple[str, str]:
    """Who is held off (``adversary``), and who is not."""
    if info.kind == "centralized":
        return (
            "anyone who sees the trained model, after any step",
            "The cloud itself holds the raw data and has to be trusted with it.",
        )
    unit = next((spent.unit for spent in info.spent.values()), "record")
    if unit == "record" and _in_shares(info):
        return _shares_parts(info)
    if unit == "record" and "min_survivors" in (info.standardised or {}):
        return _standardised_parts(info)
    if unit == "record":
        return (
            "anyone who sees every message and every model of the training, the server and all other parties included",
            "Each party adds its own noise before anything leaves it.",
        )
    return _client_parts(info)


def _standardised_parts(info: RunInfo) -> tuple[str, str]:
    """The same for local noise, after one sum with noise in shares that features are standardised by."""
    stated, plain = info.standardised or {}, (info.secure_sum or {}).get("name") == "plain"
    known, fewest = int(stated.get("colluders", 0)), int(stated["min_survivors"])
    server = "the server, which saw one sum in parts, excepted" if plain else "the server included"
    rests = (
        f" The server saw each party's part of it with a share of the noise alone, and has to be trusted with it and to"
        f" have used no sum of fewer than {fewest} parties."
        if plain
        else " That the server saw this sum only rests on the secure sum: on the computational assumptions that it"
        " states, and on 2^-40, which is within δ."
    )
    return (
        f"anyone who sees every message and every model of the training, {server}, together with up to {known} of the"
        " other parties",
        "In training each party adds its own noise before anything leaves it. The means and deviations that features"
        " are standardised by were computed once before, of all records, within the same ε: each party added a share of"
        f" the noise, sized for {fewest} survivors of which {fewest - known} are honest.{rests}",
    )


def _in_shares(info: RunInfo) -> bool:
    """Whether the promise is of records, and each party adds a share of the noise."""
    promise = info.privacy or {}
    return promise.get("noise") == "distributed" and promise.get("unit", "record") == "record"


def _shares_parts(info: RunInfo) -> tuple[str, str]:
    """The same for records and noise in shares: the worst case, whose sums alone the adversary sees."""
    promise, secure_sum = info.privacy or {}, info.secure_sum or {}
    known, fewest = int(promise.get("colluders", 0)), int(promise.get("min_survivors", 0))
    others = f"up to {known} of the other parties, who {'knows its' if known == 1 else 'know their'} own noise"
    shares = (
        f"In each step every party adds a share of the noise to the sum of its clipped gradients; it is sized for the"
        f" worst case, a sum opened over {fewest} parties of which {fewest - known} are honest, whoever dropped out. A"
        " step that was tried again is counted again."
    )
    if banded := promise.get("mechanism") == "banded":
        shares += _banded_shares(info)
    if secure_sum.get("name") == "plain":
        return (
            f"outsiders, who see every model of the training, together with {others}; the server is not among them",
            f"{shares} The server sees each party's gradients with a share of the noise alone, and has to be trusted"
            f" with them and to use no sum of fewer than {fewest} parties.",
        )
    return (
        "anyone who sees every opened sum and every model of the training, the server included, together with"
        f" {others}",
        f"{shares} That the server sees sums only, and never one party's vector, rests on the secure sum: on the"
        " computational assumptions that it states, and on 2^-40 for each sum, which is within δ."
        + ("" if banded else _TIME.format(_answers(info))),
    )


_TIME = (
    " It also rests on the time of a party's answers, which must not tell how many records it drew: {}."  # of Poisson
)


def _banded_shares(info: RunInfo) -> str:
    """What holds of fixed batches, and of noise that is correlated over steps."""
    said = info.fixed_point or {}
    return (
        f" Batches are fixed and known: a record takes part in one of every {said.get('separation', '(unknown)')} steps"
        " of its party, in the same place of each pass, and nothing is claimed for its batch being secret. The noise is"
        f" correlated over steps by a matrix of {said.get('bands', '(unknown)')} bands; the worst case is that of each"
        " step by itself, and the colluders are the same in all. What a party remembers of its earlier noise is as"
        " secret as the noise."
    )


def _answers(info: RunInfo) -> str:
    """What keeps the time of a step's answer from telling how many records were drawn, as the run has recorded it."""
    rows = (info.fixed_point or {}).get("rows")
    if rows is None:
        return "nothing here says how that was kept from it"
    padded = "every site, by its own program, pads each step" if info.sites else "every step of every party is padded"
    return f"no answer waits for a fixed time; {padded} to {int(rows)} rows, the most that one may draw"


def _client_parts(info: RunInfo) -> tuple[str, str]:
    """The same for client-level noise, by where it is added."""
    promise = info.privacy or {}
    noise, plain = promise.get("noise"), (info.secure_sum or {}).get("name") == "plain"
    if noise == "local":
        return (
            "anyone who sees every message and every model of the training, the server and all other clients included",
            "Each client adds all of the noise before anything leaves it.",
        )
    if noise == "central" and promise.get("sample_rate") is not None:
        return _secret_cohorts(float(promise["sample_rate"]))
    if noise == "central":
        return (
            "anyone who sees the model after any round",
            "The server adds the noise; it sees the sum without noise"
            + (", and each client's clipped update," if plain else "")
            + " and has to be trusted with it.",
        )
    known = promise.get("colluders")
    trust = (
        f"Each client adds a share of the noise, sized for {promise.get('min_survivors')} survivors with"
        f" {known} colluder{'' if known == 1 else 's'}, and counted by {_counted(info)}."
    )
    sees = f"anyone who sees every sum and every model, together with up to {known} of the other clients"
    if plain:
        return (sees, f"{trust} The server sees each client's update with its share of the noise alone.")
    rests = "That the server sees sums only rests on the secure sum."
    return (f"{sees}, the server included", f"{trust} {rests}{cohort_trust(info.secure_sum)}")


def _counted(info: RunInfo) -> str:
    two = (info.secure_sum or {}).get("trips") == 2
    return "the fewest that a sum in two trips may hold, whoever is said to have survived" if two else "who survived"


def _secret_cohorts(rate: float) -> tuple[str, str]:
    """The same where a trusted server keeps its cohorts secret."""
    return (
        "anyone who sees the model after any round, and nothing else of a round: neither who was selected nor how many",
        f"The server draws each client for a round with probability {rate:g}, from the operating system's randomness,"
        " and tells nobody whom it drew: the budget counts on that. It divides by the number that was to be expected,"
        " adds the noise, sees each client's clipped update, and has to be trusted with all of it. The run's folder"
        " and its reports, the times and the traffic of rounds are the server's own: they show how many were selected,"
        " and no guarantee holds against those who see them.",
    )


def cohort_trust(secure_sum: Mapping[str, object] | None) -> str:
    """What the secure sum takes for granted of how its roster was made, as a sentence to add; "" of everybody."""
    stated = secure_sum or {}
    if stated.get("cohort") == "random":
        return (
            " The server is taken to be semi-honest in the choice of the cohort: that it drew each at random out of"
            f" {stated.get('directory')} parties is on its word alone."
        )
    if stated.get("cohort") == "chosen":
        return (
            f" Each cohort was chosen by the server, and withstands {stated.get('corrupt')} colluders in it, whoever"
            " they are."
        )
    return ""


def claim_of(infos: Sequence[RunInfo]) -> Claim | None:
    """The promise of one or several runs with the same settings: the worst data owner over all of them."""
    info = infos[0]
    if info.privacy is None:
        return None
    holder, spent = max(
        ((name, spent) for each in infos for name, spent in each.spent.items()), key=lambda item: item[1].epsilon
    )
    asked = float(info.privacy["epsilon"])
    adversary, trust = sentence_parts(info)
    several = len(info.spent) > 1
    neighbours, public = stated(spent.neighbours), _public(info, spent.unit)
    guarantee = _guarantee(infos)
    whole = spent.epsilon if guarantee is None else guarantee
    early = cost(whole) != cost(spent.epsilon)
    promise = f"(ε\u00a0=\u00a0{cost(whole)}, δ\u00a0=\u00a0{power(spent.delta)})"
    sentence = (
        f"Training is {promise}-differentially private for each {spent.unit}: datasets are neighbours by"
        f" “{neighbours}”{_MEANING.get(relation_of(neighbours), '')}, and the guarantee holds against {adversary}."
        f" Public on both sides: {'; '.join(public)}. {trust} The budget asked for was"
        f" ε\u00a0=\u00a0{asked:g}; ε is an upper bound by {spent.accountant}"
        + (_EARLY.format(cost(spent.epsilon)) if early else "")
        + (f", that of the worst of {len(info.spent)} data owners ({holder})." if several else ".")
        + _of_a_person(spent)
    )
    return Claim(
        sentence=sentence,
        adversary=adversary,
        unit=spent.unit,
        neighbours=neighbours,
        public=public,
        epsilon=spent.epsilon,
        guarantee=guarantee,
        asked=asked,
        delta=spent.delta,
        accountant=spent.accountant,
        holder=holder,
    )


_EARLY = (
    ", of all that was planned, whoever chose when to stop and what to train next; what was released costs"
    " ε\u00a0=\u00a0{} if that, and its end, were fixed in advance"
)


def _guarantee(infos: Sequence[RunInfo]) -> float | None:
    """The largest guarantee of a data owner; None if one of them has none."""
    found = [spent.guarantee for info in infos for spent in info.spent.values()]
    known = [guarantee for guarantee in found if guarantee is not None]
    return max(known) if known and len(known) == len(found) else None


def _of_a_person(spent: Spent) -> str:
    """What holds for all records of one person, where the run says how many those are at most; computed anew."""
    records = spent.records_per_person
    if records is None or records < 1:
        return ""
    epsilon, delta = group_pair(max(spent.epsilon, spent.guarantee or 0.0), spent.delta, records)
    if delta >= 1.0:
        return f" For a person with up to {records} records, nothing is promised: δ would be 1."
    pair = f"(ε\u00a0=\u00a0{cost(epsilon)}, δ\u00a0=\u00a0{power(delta)})"
    return f" For a person with up to {records} records, it is {pair}."


def _public(info: RunInfo, unit: str) -> tuple[str, ...]:
    """What neighbouring datasets have in common, and the promise does not hide."""
    parties = ("who the parties are, and which of them take part in each round",)
    federated = parties if unit == "record" and info.kind == "federated" else ()
    secret = (info.privacy or {}).get("sample_rate") is not None
    known = [what for what in _PUBLIC.get(unit, ()) if not (secret and what == _SURVIVORS)]
    return (*known, *federated, "all settings")


def no_claim(kind: str, secure_sum: Mapping[str, object] | None) -> str:
    """What is said of a run that promises no differential privacy."""
    if kind == "centralized":
        return "No differential privacy is promised, and the cloud holds the raw data of every party."
    name = str((secure_sum or {}).get("name", "")).lower()
    if name in ("", "plain"):
        seen = "The server sees each party's update in the clear; the raw records stay with the parties."
    else:
        shared = (secure_sum or {}).get("key") == "shared"
        whom = "a server that no party gives the key to" if shared else "the server and the other parties"
        seen = (
            f"The secure sum hides each party's update from {whom}, under the trust it states; the sum and every model"
            f" are seen in the clear, and may give records away.{cohort_trust(secure_sum)}"
        )
    return f"No differential privacy is promised. {seen}"


def units_of(infos: Sequence[RunInfo]) -> set[str]:
    """Whose presence the promises of these runs hide: "record", "client"; empty if none promises anything."""
    return {str(info.privacy.get("unit", "record")) for info in infos if info.privacy is not None}


def site_caveats(info: RunInfo) -> tuple[str, ...]:
    """What qualifies a run whose parties were at sites of their own; nothing for another."""
    if not info.sites:
        return ()
    metrics = [release["what"] for release in info.releases if release.get("channel") == "site metrics"]
    return (
        *(_CAVEATS_SITES if info.privacy is not None else _CAVEATS_SITES[:1]),
        *((_shares_parts(info)[1],) if _in_shares(info) else ()),
        *(f"After each round this is released, and no privacy promise covers it: {what}." for what in metrics),
    )


def composed_words(found: Composed) -> str:
    """Which epsilon is for whom: of one model, and of all that a report shows."""
    each, delta = found.unit, power(found.delta)
    one = f"For a reader of one model: ε = {cost(found.single)} at most for each {each}, as its own row says."
    if found.runs == 1:
        return one
    seen = f"For a reader of this whole report, which shows {found.runs} trainings on the same {each}s"
    if found.epsilon is None:
        return f"{one} {seen}: more, and unknown, for not every ledger is there, or they do not add up."
    owner = "" if found.owner in ("clients", "pooled") else f" of {found.owner}, which has the most"
    total = f"ε = {cost(found.epsilon)} at δ = {delta} for each {each}{owner}, all of them composed"
    return f"{one} {seen}: {total}. Trainings that were made for attacks are not among them."


def caveats(units: Set[str], *, compared: bool, metrics: Sequence[str] = ()) -> tuple[str, ...]:
    """What a reader must know to read the numbers rightly. units: as by :func:`units_of`."""
    return (
        (_CAVEATS_COMPARED if compared else ())
        + (_CAVEATS_MIXED if len(units) > 1 else ())
        + (_CAVEATS_CLIENT if "client" in units else ())
        + (_CAVEATS_PRIVATE if units else ())
        + (_CAVEATS_GAP if units and any(map(is_gap, metrics)) else ())
        + _CAVEATS_ALWAYS
    )


def merged_versions(infos: Sequence[RunInfo]) -> dict[str, str]:
    """Versions over all runs; where they differ, every one that occurs."""
    found: dict[str, list[str]] = {}
    for info in infos:
        for package, version in info.versions.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: " and ".join(versions) for package, versions in found.items()}


def short_path(folder: Path) -> str:
    """The last two names of a path: enough to find it, without the reporter's home folder."""
    return "/".join(folder.parts[-2:])
