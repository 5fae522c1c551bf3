"""What only a human knows of a run, and a report should say: written in the settings, never computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Context:
    """What only a human knows of the data and the model, for the report; what is empty is printed as not stated."""

    purpose: str = ""
    """What the model is for."""
    curator: str = ""
    """Who publishes it."""
    curator_type: str = ""
    """Government, Industry or Nonprofit."""
    region: str = ""
    """Whose data they are, and where."""
    sector: str = ""
    """Technology, Healthcare, Education, Government, Energy or Finance."""
    recipients: str = ""
    """Who gets the model, and who the report."""
    legal_basis: str = ""
    """The legal basis, as the controller names it."""
    dpia: str = ""
    """Reference of the impact assessment."""
    records_per_person: str = ""
    """The most records that one person has in the data, in words."""
    releases: tuple[str, ...] = ()
    """What else was published of the same records."""
    justification: str = ""
    """Why this epsilon."""
    access: str = ""
    """Who may read data, ledgers and models."""
    reviewer: str = ""
    """Who looks at this again."""
    review_by: str = ""
    """And by when."""
    authors: tuple[str, ...] = ()
    """Who wrote this table."""


CONTEXT_WORDS = {
    "purpose": "What the model is for",
    "curator": "Who publishes it",
    "curator_type": "What kind of body that is",
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
