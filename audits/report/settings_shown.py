"""The settings of configurations, as a report shows them: what is set, and what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from choral.audits.findings.schema import ArmResult


def settings(arms: tuple[ArmResult, ...]) -> list[tuple[str, str]]:
    """The first arm's settings, and of others what differs from them; once for all the arms that share it."""
    first = next((arm.config for arm in arms if arm.config), {})
    found: dict[str, list[str]] = {}
    for arm in arms:
        if arm.config:
            text = settings_text(first if arm.config == first else _changed(arm.config, first))
            found.setdefault(text, []).append(arm.name)
    if len(found) == 1:
        return [("all configurations", text) for text in found]
    return [
        (", ".join(names) + (", where they differ from the first" if place else ""), text)
        for place, (text, names) in enumerate(found.items())
    ]


def _changed(config: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not the same; "not set" for those that are missing."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys([*config, *first]):
        mine, other = config.get(key, "not set"), first.get(key)
        if mine == other:
            continue
        found[key] = _changed(mine, other) if isinstance(mine, Mapping) and isinstance(other, Mapping) else mine
    return found


def settings_text(config: Mapping[str, Any]) -> str:
    """Without what is not set: null, and empty lists and tables. The JSON holds those too."""
    return json.dumps(_set(config), indent=2, ensure_ascii=False, sort_keys=True)


def _set(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _set(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item not in ({}, [])}
    return value
