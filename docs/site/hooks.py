"""What the site has beside its pages: executed notebooks, the table of settings, links to files of the repository."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, get_type_hints

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Execute every notebook, and add a page for each, with its pictures."""
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        text, pictures = page_of(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ become names of files; notebooks are pages; the settings page gets its table."""
    markdown = re.sub(
        r"\[([^\]]+)\]\((?:\.\./)+(?:audits|benchmarks|examples|network|privacy|protocols|src|tests|trainers|[A-Z]+\.)[^)]*\)",
        r"`\1`",
        markdown,
    )
    markdown = re.sub(r"(notebooks/\w+)\.ipynb", r"\1.md", markdown)
    return markdown.replace("<!-- settings -->", settings()) if "<!-- settings -->" in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things as Sphinx does, :class:`Name`: here the name alone is shown."""
    return re.sub(r":(?:class|func|meth|mod|attr|data|exc):<code>~?", "<code>", html)


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures. Raises: CellExecutionError for a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for number, output in enumerate(cell.outputs):
            name = f"{path.stem}-{len(parts)}-{number}.png"
            parts.append(_shown(output, name, pictures))
    return "\n\n".join(part for part in parts if part), pictures


def _shown(output: Any, name: str, pictures: dict[str, bytes]) -> str:
    if output.output_type == "stream":
        text = re.sub("\x1b\\[[0-9;]*m", "", output.text)  # colours
        text = text.replace(f"{ROOT}{os.sep}", "").rstrip()  # where it was built is nobody's concern
        return f"```text\n{text}\n```"
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a bar, which is there while the cell runs
    if "image/png" in data:
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![A picture drawn by the cell above]({name})"
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    return f"```text\n{data['text/plain']}\n```" if "text/plain" in data else ""


def settings() -> str:
    """Every key with its type, default and meaning, a table for each section."""
    from choral.jobs.settings import Arm, Settings

    found: list[str] = []
    _tables(Settings, "", found)
    _tables(Arm, "arms.NAME", found)
    return "\n\n".join(found)


def _tables(kind: Any, prefix: str, found: list[str]) -> None:
    from tyro._docstrings import get_field_docstring

    hints, rows, parts = get_type_hints(kind), [], []
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{prefix}.{field.name}" if prefix else field.name
        if dataclasses.is_dataclass(hint):
            parts.append((hint, name))
            continue
        default = "" if field.default is dataclasses.MISSING or field.default is None else f"`{field.default}`"
        said = " ".join((get_field_docstring(kind, field.name, ()) or "").split()).replace("|", "\\|")
        shown = re.sub(r"<class '([\w.]+)'>", r"\1", str(hint)).replace("typing.", "").replace("pathlib.", "")
        rows.append(f"| `{field.name}` | {said} | {default} | `{shown.replace('|', 'or')}` |")
    title = f"[{prefix}]" if prefix else "At the top"
    found.append("\n".join([f"## {title}", "", "| key | means | default | type |", "|---|---|---|---|", *rows]))
    for hint, name in parts:
        _tables(hint, name, found)
