"""Check reports against WCAG 2.2 with axe-core in headless Chromium: desk, phone, dark, print; and count their pages.

    npm install --no-save --prefix build/axe axe-core@4.14.1
    python tests/accessibility.py build/axe/node_modules/axe-core/axe.min.js PAGE.html...      (or: make accessibility)

Pages forbid scripts: a copy is looked at that allows them, with all details open. Dark and print are had by taking the
condition off their style sheets; on paper nothing is touched. Exit code 1 if any rule is violated, nothing
could be checked, or more than 12 pages of paper come of one file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

MOST_PAGES = 12
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
DARK = ("@media (prefers-color-scheme: dark)", "@media all")
PRINT = ("@media print", "@media all")
VIEWS: dict[str, tuple[int, tuple[tuple[str, str], ...]]] = {
    "desktop": (1280, ()),
    "phone": (390, ()),
    "dark": (1280, (DARK,)),
    "print": (1000, (PRINT,)),
}
RUN = """
axe.run(document, {runOnly: {type: "tag", values: %s}, rules: {"target-size": {enabled: %s}}}).then(found => {
  const said = found.violations.map(each => ({rule: each.id, impact: each.impact, help: each.help,
    nodes: each.nodes.map(node => node.target.join(" ") + ": " + (node.any[0] || node.all[0] || {}).message)}));
  document.body.innerHTML = "<pre id='found'></pre>";
  document.getElementById("found").textContent = JSON.stringify({violations: said, passes: found.passes.length});
});
"""


def prepared(page: str, axe: str, changes: tuple[tuple[str, str], ...]) -> str:
    """The page as it is looked at, which writes into itself what was found."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    page = re.sub(r"<details(?! open)", "<details open", page)
    for old, new in changes:
        page = page.replace(old, new)
    touched = "false" if PRINT in changes else "true"
    script = f"<script>{axe}</script><script>{RUN % (json.dumps(TAGS), touched)}</script>"
    head, mark, tail = page.rpartition("</body>")
    return head + script + mark + tail if mark else page + script


def chromium(folder: str, *words: str) -> subprocess.CompletedProcess[str]:
    start = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=240, check=False)


def printed(page: Path) -> int:
    """How many pages of paper come of it. Raises: FileNotFoundError where none do."""
    with tempfile.TemporaryDirectory() as folder:
        paper = Path(folder) / "page.pdf"
        chromium(folder, "--no-pdf-header-footer", f"--print-to-pdf={paper}", page.absolute().as_uri())
        return len(re.findall(rb"/Type\s*/Page\b(?!s)", paper.read_bytes()))


def found_in(page: Path, axe: str, width: int, changes: tuple[tuple[str, str], ...]) -> dict[str, object]:
    """What axe finds. Raises: RuntimeError where it did not come to an end."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(prepared(page.read_text("utf-8"), axe, changes), "utf-8")
        words = [f"--window-size={width},1000", "--virtual-time-budget=60000", "--dump-dom", copy.as_uri()]
        done = chromium(folder, *words)
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    if said is None:
        raise RuntimeError(f"axe did not end: {done.stderr[-300:]}")
    found: dict[str, object] = json.loads(unescape(said[1]))
    return found


def main(words: list[str]) -> int:
    axe, pages, wrong = Path(words[0]).read_text("utf-8"), [Path(each) for each in words[1:]], 0
    for page in pages:
        for view, (width, changes) in VIEWS.items():
            found = found_in(page, axe, width, changes)
            violations: list[dict[str, list[str]]] = found["violations"]  # type: ignore[assignment]
            wrong += len(violations) + (not found["passes"])
            print(f"{page.name}, {view}: {len(violations)} rules violated, {found['passes']} hold")
            for each in violations:
                print(f"  {each['rule']} ({each['impact']}): {each['help']}; {len(each['nodes'])} places")
                print("".join(f"    {node[:200]}\n" for node in each["nodes"][:5]), end="")
        paper = printed(page)
        wrong += not 1 <= paper <= MOST_PAGES
        print(f"{page.name}, on paper: {paper} pages, at most {MOST_PAGES}")
    return 1 if wrong or not pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
