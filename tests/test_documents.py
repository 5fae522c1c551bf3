"""What README.md and docs/ print is run here: every block of Python and TOML, and every console line.

The blocks of a page run in their order, in one namespace and one empty folder, after what the page takes for granted:
the reader's own data and functions, small ones (`GIVEN`). All that is Choral's a block must import itself, or an
earlier block of its page. Values in comments behind an expression, and lines behind a `print`, are compared.

Console lines run as they stand, except: commands that train get fewer seeds and rounds (`SMALLER`), those that fetch
data sets (`PARSED`) or start several processes are only parsed, and `make` says what it would do. A block that cannot
run stands under a comment `<!-- sketch: why -->`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from choral.audits.costs.prices import read_prices
from choral.cli.command_line import main
from choral.jobs.settings import Settings, read_settings
from choral.network.site.files.settings import read_site

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
SLOW = {"docs/client-level.md", "docs/report.md"}
SKETCHES = 5  # at most, in all pages together

SMALLER = {
    "compare": "--seeds 1 --training.rounds 1 --epsilons 8 --audit.canaries 0 --audit.no-probe --workers 1",
    "train": "--training.rounds 1",
}
PARSED = ("--task adult", "--task fashion", "--data-dir")  # fetches a data set

DATA = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Task

torch.manual_seed(0)

def visits_of(records):
    features = torch.randn(records, 8)
    return TensorDataset(features, (features[:, 0] > 0).long())

def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

def build(dataset):
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=32, shuffle=True)

def fit(model, optimizer, loader):
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()

def accuracy(model, dataset):
    features, labels = dataset.tensors
    return float((model(features).argmax(1) == labels).float().mean())

test = visits_of(200)

def evaluate(model):
    return accuracy(model, test)

north, south, east = (visits_of(120) for _ in range(3))
parties = {"north": north, "south": south, "east": east}
job = dict(task=Task(build=build, fit=fit, evaluate=evaluate), parties=parties, rounds=2)
model, optimizer, loader = build(north)
loss_function = nn.functional.cross_entropy
"""
EIGHT = 'job["parties"] = {f"hospital {n}": visits_of(64) for n in range(8)}'
SCORES = """
import random
from pathlib import Path
coin = random.Random(1)
lines = [f"{coin.gauss(0, 1)},{coin.randrange(2)}" for _ in range(200)]
Path("scores.csv").write_text("score,member\\n" + "\\n".join(lines) + "\\n")
"""
VISITS = """
rows = [f"{n % 3},{20 + n % 60},{n % 2}" for n in range(120)]
Path("visits.csv").write_text("hospital,age,died\\n" + "\\n".join(rows) + "\\n")
"""
GIVEN = {
    "README.md": SCORES + VISITS,
    "docs/audits.md": SCORES
    + """
canaries = list(range(100))

def train(members):
    return set(members)

def score(model, canaries):
    return [coin.gauss(0, 1) for _ in canaries]
""",
    "docs/client-level.md": "parties = {f'phone {n}': visits_of(40) for n in range(200)}",
    "docs/data.md": "from pathlib import Path\n"
    + VISITS
    + """
visits = TensorDataset(torch.arange(20.0, 80.0).reshape(-1, 1), torch.arange(60) % 2)
hospitals = [f"hospital {n % 3}" for n in range(60)]
import json
Path("femnist/data/train").mkdir(parents=True)
users = {f"f{n}": {"x": [[0.0] * 784, [1.0] * 784], "y": [0, 1]} for n in range(2)}
whole = {"users": list(users), "num_samples": [2, 2], "user_data": users}
Path("femnist/data/train/all.json").write_text(json.dumps(whole))
""",
    "docs/engines.md": """
def make(number):
    torch.manual_seed(number)
    return visits_of(200)
""",
    "docs/homomorphic.md": EIGHT,
    "docs/participation.md": """
from choral.trainers import VirtualParties

def make(number):
    torch.manual_seed(number)
    return visits_of(20)

job["parties"] = VirtualParties(2000, make, examples=20)
""",
    "docs/price.md": """
from pathlib import Path
text = (Path(page).read_text()).split("```toml\\n")[1].split("```")[0]
Path("my-prices.toml").write_text(text)
""",
    "docs/privacy.md": """
whole = visits_of(60_000)

def of_rate(learning_rate):
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=learning_rate), DataLoader(whole, batch_size=600)

def validation_accuracy(model):
    return accuracy(model, test)

import lightning
import transformers
from torch.nn import functional as F

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, _):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

module, plain_loader = Module(), DataLoader(north, batch_size=32, shuffle=True)
tokens = torch.randint(11, (64, 8))
records = [{"input_ids": t, "labels": int(t[0] > 5)} for t in tokens]
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
classifier = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, **sizes))
quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True)
args = transformers.TrainingArguments("trained", num_train_epochs=3, use_cpu=True, max_grad_norm=0, **quiet)
""",
    "docs/report.md": SCORES
    + """
from choral import Compute, Keep, Privacy, centralize, federate
clouds = [centralize(**job, compute=Compute(seed=seed)) for seed in (0, 1)]
federateds = [federate(**job, compute=Compute(seed=seed)) for seed in (0, 1)]
private_runs = [federate(**job, privacy=Privacy(epsilon, 1e-5)) for epsilon in (2.0, 8.0)]
federate(**job, privacy=Privacy(8.0, 1e-5), keep=Keep(out="runs/digits/arms/federated-dp/seed-0-epsilon-8"))
Path("mine.py").write_text(mine)
from choral.cli.command_line import main
main("train examples/digits.toml --privacy.epsilon 3 --training.rounds 1 --out runs/fed --quiet".split())
""",
    "docs/secure-sums.md": EIGHT,
    "docs/training.md": """
from safetensors.torch import save_file

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.encoder(x).relu()
        return self.head((self.query(x) + self.value(x)).relu())

network = Network
dataset, images = north, torch.randn(4, 8)
north_test, south_test, east_test = (visits_of(40) for _ in range(3))
save_file(Network().state_dict(), "base.safetensors")
from choral.cli.command_line import main
main("train examples/digits.toml --training.rounds 1 --out runs/fed --quiet".split())
""",
}
AFTER = {
    "README.md": "assert audit(run).verdict == 'holds'",
    "docs/algorithms.md": """
from dataclasses import replace
from choral import federate
losses = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
run = federate(replace(job["task"], loss=losses), job["parties"], rounds=2, algorithm=Signs())
assert run.info.algorithm["kind"] == "signs" and run.history[-1].round == 2
""",
}
MINE = """
import random

canaries = list(range(100))
def train(members): return set(members)
def score(model, canaries): return [random.random() for _ in canaries]
def wrap(privacy): return privacy.wrap
"""


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line of content. sketch: why it is not run, "" for one that is."""

    page: str
    line: int
    language: str
    text: str
    sketch: str | None


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    lines = (ROOT / page).read_text().splitlines()
    inside: list[str] | None = None
    language, sketch, start = "", None, 0
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("```"):
            if inside is None:
                before = next((each for each in reversed(lines[: number - 1]) if each.strip()), "")
                said = re.fullmatch(r"<!-- sketch: ?(.*?) ?-->", before.strip())
                inside, language, start = [], line.strip()[3:], number + 1
                sketch = said[1] if said else None
            else:
                text = textwrap.dedent("\n".join(inside)) + "\n"
                found.append(Block(page, start, language, text, sketch))
                inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None, f"{page}: a block without an end"
    return found


def test_every_page_is_found_from_the_first_one_and_from_the_menu() -> None:
    """A link from docs/index.md, an entry in the site's menu, and the room's chapters in the page on architecture."""
    first, menu = ((ROOT / name).read_text() for name in ("docs/index.md", "mkdocs.yml"))
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name}" in first, page.name
        assert f" {page.name}\n" in menu, page.name
    rooms = (ROOT / "docs/architecture.md").read_text()
    for folder in ("src/choral", "privacy", "protocols", "trainers", "network", "audits"):
        for init in (ROOT / folder).glob("**/__init__.py"):
            chapter = init.parent.relative_to(ROOT / folder)
            if chapter.parts and not (ROOT / folder / chapter.parts[0]).is_symlink():
                assert f"`{chapter.as_posix()}/`" in rooms, f"{folder}/{chapter}"


def test_every_block_is_run_or_a_sketch_with_a_reason() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    assert len(every) > 40
    assert {block.language for block in every} <= {"python", "console", "toml", "text"}
    sketches = [block for block in every if block.sketch is not None]
    assert all(len(str(block.sketch)) > 20 for block in sketches)
    assert len(sketches) <= SKETCHES


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU available")
@pytest.mark.filterwarnings("ignore:.*tensorboardX", "ignore:.*log_every_n_steps")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES if blocks(page)]
)
def test_what_a_page_prints_holds(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    space = vars(module)
    space |= {"page": str(ROOT / page), "mine": MINE}
    exec(compile(DATA + GIVEN.get(page, ""), f"what {page} takes for granted", "exec"), space)
    for block in blocks(page):
        if block.sketch is None:
            {"python": run_python, "console": run_console, "toml": read_toml, "text": lambda *_: None}[block.language](
                block, space
            )
    exec(compile(AFTER.get(page, ""), f"what {page} promises", "exec"), space)


def run_python(block: Block, space: dict[str, Any]) -> None:
    """Run the block statement by statement, and compare what its comments say that values are."""
    lines = block.text.splitlines()
    for node in ast.parse(block.text).body:
        where = f"{block.page}, line {block.line + node.lineno - 1}"
        _, _, said = lines[(node.end_lineno or 1) - 1].partition("  # ")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if not isinstance(node, ast.Expr):
                exec(compile(ast.Module([node], []), where, "exec"), space)
                continue
            value = eval(compile(ast.Expression(node.value), where, "eval"), space)
        if number := re.match(r"-?\d+(\.\d+)?", said):
            digits = len((number[1] or ".")[1:])
            assert round(float(value), digits) == float(number[0]), where
        if lines[node.lineno - 1].startswith("print(") and said:
            assert shape(printed.getvalue()).startswith(shape(said.split("...")[0])), where


def shape(text: str) -> str:
    """The text without its numbers, which differ from machine to machine and with the noise."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text.strip())


def run_console(block: Block, space: dict[str, Any]) -> None:
    for line in block.text.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line[2:], comments=True)
            where = f"{block.page}: {line}"
            if words[0] == "make":
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            elif words[0] == "choral":
                ran = space.setdefault("ran", [])
                if not (trains(words[1:]) and words in ran):  # a page may say it twice
                    run_choral(words[1:], where)
                ran.append(words)
            else:
                assert words[0] == "torchrun", where
                run_choral([*words[words.index("choral") + 1 :], "--help"], where)  # tests of data_parallel start it


def trains(words: list[str]) -> bool:
    """Whether the command trains as a reader does who begins."""
    return words[0] in SMALLER and "--out" in words and "--resume" not in words


def run_choral(words: list[str], where: str) -> None:
    if "--help" in words or any(flag in " ".join(words) for flag in PARSED):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*words, "--help-all"]) == 0, where
        return
    if trains(words):
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    smaller = SMALLER.get(words[0], "").split()
    assert main([*words, *smaller]) == 0, where


def read_toml(block: Block, space: dict[str, Any]) -> None:
    """A table of prices, a part of a settings file, or a site's settings, which say so in their first line."""
    file = Path("block.toml")
    file.write_text(block.text.replace("/srv/", ""))
    if block.text.startswith("# site.toml"):
        Path("visits.csv").touch()
        assert read_site(file).name == "north"
        return
    if block.page == "docs/price.md" and "[report" not in block.text:
        read_prices(file)
    else:
        read_settings(file, Settings)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for folder, name in re.findall(r"\b(benchmarks|examples)/([\w-]+\.\w+)", text):
        assert (ROOT / folder / name).is_file(), name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
