"""What comes of it: estimates with their errors, what was promised and spent, as a table, as JSON and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Self

import msgspec

from choral.errors import ConfigError
from choral.privacy import Spent
from choral.trainers.analytics.estimates import Estimated

FORMAT = "choral statistics 1"
_MOST_ROWS = 60  # of one statistic in a table for the terminal


@dataclass(frozen=True, kw_only=True)
class FederatedStatistics:
    """estimates: by the name that each was asked for under, then by what it says ("mean", "count [0, 18)").

    claim: what is promised to whom, in words. releases: what became known besides, in words. survivors: the parties in
    the sum, of so many. spent: of each data owner, or of "clients"; empty without noise. left_out: coordinates that too
    few parties contributed to, or cells that count less than `threshold` with noise. false_publication: by statistic,
    how often a cell that one contributor alone has passes that threshold. bytes_up, bytes_down: of the busiest party.
    """

    estimates: Mapping[str, Mapping[str, Estimated]]
    claim: str
    releases: tuple[str, ...]
    survivors: tuple[str, ...]
    parties: int
    spent: Mapping[str, Spent]
    secure_sum: str
    left_out: int
    bytes_up: int
    bytes_down: int
    threshold: float | None = None
    false_publication: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Mapping[str, Estimated]:
        return self.estimates[name]

    @property
    def worst(self) -> Spent | None:
        """Of the data owner that has spent the most; None without noise."""
        return max(self.spent.values(), key=lambda spent: spent.epsilon, default=None)

    def rows(self) -> Iterator[tuple[str, str, Estimated]]:
        """All estimates, one by one."""
        for name, found in self.estimates.items():
            for label, estimate in found.items():
                yield name, label, estimate

    def table(self) -> str:
        """The estimates as text, with the standard error of each, and what of it is noise."""
        lines: list[tuple[str, ...]] = [("statistic", "", "estimate", "standard error", "of it noise")]
        for name, found in self.estimates.items():
            for at, (label, estimate) in enumerate(found.items()):
                if at == _MOST_ROWS:
                    lines.append(("", f"... and {len(found) - at} more", "", "", ""))
                    break
                numbers = map(_shown, (estimate.value, estimate.standard_error, estimate.noise))
                lines.append((name if at == 0 else "", label, *numbers))
        widths = [max(len(line[at]) for line in lines) for at in range(5)]
        rows = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        return "\n".join([*rows, "", self.claim, *self.releases])

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "format": FORMAT,
            "claim": self.claim,
            "releases": list(self.releases),
            "secure_sum": self.secure_sum,
            "parties": self.parties,
            "survivors": list(self.survivors),
            "left_out": self.left_out,
            "threshold": self.threshold,
            "false_publication": dict(self.false_publication),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "spent": {name: spent.to_json() for name, spent in self.spent.items()},
            "estimates": {
                name: {
                    label: {**asdict(estimate), "standard_error": estimate.standard_error}
                    for label, estimate in found.items()
                }
                for name, found in self.estimates.items()
            },
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What :meth:`save` wrote as JSON. Raises: ConfigError for another file."""
        try:
            plain = json.loads(Path(path).read_bytes())
            if plain.pop("format") != FORMAT:
                raise ValueError
            made = {
                name: {
                    label: Estimated(each["value"], each["noise"], each["sampling"]) for label, each in found.items()
                }
                for name, found in plain.pop("estimates").items()
            }
            spent = {name: msgspec.convert(each, Spent) for name, each in plain.pop("spent").items()}
            plain |= {key: tuple(plain[key]) for key in ("releases", "survivors")}
            return cls(estimates=made, spent=spent, **plain)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, msgspec.MsgspecError):
            raise ConfigError(
                f"{path} holds no statistics", hint="`choral stats --out DIR` writes statistics.json"
            ) from None

    def save(self, path: str | Path) -> Path:
        """Write it as NAME.json or NAME.html. Raises: ConfigError for another ending."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        elif path.suffix == ".html":
            path.write_text(page(self.to_json()), encoding="utf-8")
        else:
            raise ConfigError(f"statistics are saved as .json or .html, not as {path.name!r:.80}")
        return path

    def save_in(self, folder: str | Path) -> tuple[Path, Path]:
        """Write statistics.json and statistics.html there."""
        return self.save(Path(folder) / "statistics.json"), self.save(Path(folder) / "statistics.html")


def page(found: Mapping[str, Any]) -> str:
    """Statistics as they stand in JSON, as one offline page. Every name in it is escaped."""
    parts = []
    for name, estimates in found["estimates"].items():
        rows = "".join(
            f"<tr><th scope='row'>{escape(label)}</th>"
            + "".join(f"<td>{_shown(each[key])}</td>" for key in ("value", "standard_error", "noise"))
            + "</tr>"
            for label, each in estimates.items()
        )
        head = "<tr><th></th><th>estimate</th><th>standard error</th><th>of it noise</th></tr>"
        parts.append(f"<h2>{escape(name)}</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table>")
    claim = "".join(f"<p>{escape(text)}</p>" for text in (found["claim"], *found["releases"]))
    style = (
        "body{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.15rem .8rem;border-bottom:1px solid #ccc;text-align:right}"
        "th[scope=row]{text-align:left;font-weight:normal}"
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Statistics of {found['parties']} parties</title>"
        f"<style>{style}</style><h1>Statistics of {found['parties']} parties</h1>{claim}{''.join(parts)}</html>\n"
    )


def _shown(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.6g}"


def _aligned(line: tuple[str, ...], widths: list[int]) -> list[str]:
    padded = list(zip(line, widths, strict=True))
    return [text.ljust(width) for text, width in padded[:2]] + [text.rjust(width) for text, width in padded[2:]]
