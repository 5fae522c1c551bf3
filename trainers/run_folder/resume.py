"""Which settings may differ where a run is continued, and which must not."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from choral.differences import differences, in_short
from choral.doors import worded
from choral.errors import ConfigError
from choral.trainers.run_folder.info import RunInfo

_SHARED_KEYS = {
    "audit",
    "evaluation",
    "title",
    "seeds",
    "target",
    "device",
    "epsilons",
    "arms",
    "privacy",
    "seed",
    "prices",
    "price",
}  # of the job, or compared elsewhere
_COMPUTED = ("precision", "compile")
_PROMISES = ("server", "corrupt", "min_survivors", "cohort", "trips", "honest_floor")
"""Of a secure sum: who is withstood, how few are ever summed, and whether they are confirmed."""
_FOUR = {"trips": 4}
"""What a masked sum has that states none: records of four trips do not say so."""


def check_same(old: RunInfo, new: RunInfo) -> None:
    """Refuse to resume a run that was started with other settings.

    More rounds than it was to have are its going on, unless noise or learning rates were planned for all of them.
    """
    if new.rounds > old.rounds and old.privacy is None and (old.schedule or {}).get("kind") != "cosine":
        planned = dict(new.config.get("training") or {})
        if "rounds" in planned:
            training = {**planned, "rounds": (old.config.get("training") or {}).get("rounds")}
            new = msgspec.structs.replace(new, config={**new.config, "training": training})
        new = msgspec.structs.replace(new, rounds=old.rounds)
    fields = (
        "kind",
        "rounds",
        "seed",
        "parties",
        "population",
        "privacy",
        "algorithm",
        "start",
        "tuning",
        "schedule",
        "sites",
        "standardised",
    )
    _compare(
        old,
        new,
        (*fields, *_COMPUTED, "participation", "weights", "ledgers"),
        {*old.config, *new.config} - _SHARED_KEYS,
    )


def check_complete(old: RunInfo, new: RunInfo) -> None:
    """The same for what is known only once the model is built."""
    _compare(old, new, ("parameters", "fixed_point"))
    before, now = old.secure_sum or {}, new.secure_sum or {}
    if any(before.get(key) != now.get(key) for key in ("name", "key")):
        raise ConfigError("cannot resume with another secure sum", hint=_same())
    before, now = ({**_FOUR, **stated} for stated in (before, now))
    if changed := [key for key in _PROMISES if key in before and before[key] != now.get(key)]:
        raise ConfigError(  # what is recorded is said of all rounds
            f"cannot resume with a secure sum of other terms: {changed[0]} was {before[changed[0]]}, now it is"
            f" {now.get(changed[0])}",
            hint=_same(),
        )


def _compare(old: RunInfo, new: RunInfo, fields: tuple[str, ...], settings: Iterable[str] = ()) -> None:
    plain = ({name: msgspec.to_builtins(getattr(info, name)) for name in fields} for info in (old, new))
    was, now = plain
    changed = [each for name in fields for each in differences(was[name], now[name], name)]
    changed += [each for key in sorted(settings) for each in differences(old.config.get(key), new.config.get(key), key)]
    if changed:
        raise ConfigError(f"cannot resume: {in_short(list(dict.fromkeys(changed)))}", hint=_same())


def _same() -> str:
    return "use the same settings, or a new " + worded(command="--out", python="out=")
