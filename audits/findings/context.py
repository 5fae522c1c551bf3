"""What only a human knows of a run, and a report should say: written in the settings, never computed."""

from __future__ import annotations

import msgspec


class Context(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[report.context]``; what is empty is printed as not stated.

    purpose: what the model is for. curator: who publishes it. region, sector: whose data, of what field. recipients:
    who gets the model, and who this report. legal_basis, dpia: as the controller names them. records_per_person: the
    most that one person has in the data, in words. releases: what else was published of the same records, one
    sentence each. justification: why this epsilon. access: who may read data, ledgers and models. reviewer,
    review_by: who looks at this again, and when. authors: who wrote this table.
    """

    purpose: str = ""
    curator: str = ""
    region: str = ""
    sector: str = ""
    recipients: str = ""
    legal_basis: str = ""
    dpia: str = ""
    records_per_person: str = ""
    releases: tuple[str, ...] = ()
    justification: str = ""
    access: str = ""
    reviewer: str = ""
    review_by: str = ""
    authors: tuple[str, ...] = ()


CONTEXT_WORDS = {
    "purpose": "What the model is for",
    "curator": "Who publishes it",
    "region": "Whose data, where",
    "sector": "Sector",
    "recipients": "Who gets model and report",
    "legal_basis": "Legal basis",
    "dpia": "Impact assessment",
    "records_per_person": "Records of one person at most",
    "releases": "Other releases of these records",
    "justification": "Why this ε",
    "access": "Who may read data, ledgers, models",
    "reviewer": "Reviewer",
    "review_by": "Next review",
    "authors": "Stated by",
}
