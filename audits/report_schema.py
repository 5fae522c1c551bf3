"""The published form of reports, as a JSON Schema."""

from __future__ import annotations

from typing import Any

import msgspec

from choral.audits.comparison.comparison import Comparison
from choral.audits.findings.schema import FORMAT_VERSION
from choral.audits.run.run_audit import Audit


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a ``report.json`` of this version, of either kind.

    What the fields mean is said in the docstrings of the structs that it is made from.
    """
    schema: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(msgspec.json.schema(Audit | Comparison)))
    for definition in schema["$defs"].values():
        definition.pop("description", None)
    title = f"Choral report, version {FORMAT_VERSION}"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}
