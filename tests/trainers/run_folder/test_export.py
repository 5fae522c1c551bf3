"""A trained model as .pt2 and .onnx: equal outputs for any number of records, nothing of the data in the file."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from flat_arguments import federate
from torch import nn

from choral.cli.command_line import main
from choral.errors import ConfigError
from choral.trainers import InitialWeightsError, lora
from choral.trainers.run_folder import export as exporting
from choral.trainers.run_folder.export import ExportError, _compare, export

onnxruntime = pytest.importorskip("onnxruntime", reason="needs choral[onnx]")
BOTH = pytest.mark.parametrize("suffix", [".pt2", ".onnx"])


class Small(nn.Module):
    """Convolution, flattening, dropout: what depends on the number of records, and on eval mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.drop = nn.Conv2d(1, 3, 3), nn.Linear(3 * 4 * 4, 2), nn.Dropout(0.5)

    def forward(self, images):
        return self.head(self.drop(torch.tanh(self.conv(images)).flatten(1)))


def outputs_of(path, *inputs):
    """By the format's own runtime, apart from our code."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, fed)[0])


@BOTH
def test_outputs_are_equal_for_any_number_of_records(tmp_path, suffix):
    torch.manual_seed(0)
    trained, other = Small(), Small()
    path = tmp_path / f"model{suffix}"
    done = export(other, trained.state_dict(), [torch.randn(5, 1, 6, 6)], path)
    assert done.path == path
    assert done.batches == (1, 2, 5)
    assert done.max_difference < 1e-5
    trained.eval()
    for count in (1, 2, 3, 17):
        images = torch.randn(count, 1, 6, 6)
        assert torch.allclose(outputs_of(path, images), trained(images), atol=1e-5)
    assert other.training  # and neither its weights nor its mode were touched
    assert not torch.equal(other.head.weight, trained.head.weight)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@BOTH
def test_nothing_of_the_example_inputs_or_this_machine_is_in_the_file(tmp_path, suffix):
    """torch.export keeps the inputs that it traced with: here they would be somebody's records."""
    secret = torch.full((4, 1, 6, 6), 0.123456789)
    path = tmp_path / f"model{suffix}"
    export(Small(), Small().state_dict(), [secret], path)
    content = [path.read_bytes()]
    if suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            content += [archive.read(name) for name in archive.namelist()]
    assert all(secret.numpy().tobytes()[:8] not in part for part in content)
    assert all(__file__.encode() not in part for part in content)


@BOTH
def test_several_inputs_and_integers(tmp_path, suffix):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(5, 2)

        def forward(self, tokens, age):
            return self.head(torch.cat([self.embed(tokens).mean(1), age], dim=1))

    torch.manual_seed(0)
    model = Tokens()
    inputs = (torch.randint(9, (3, 6)), torch.randn(3, 1))
    path = tmp_path / f"model{suffix}"
    assert export(model, model.state_dict(), inputs, path).max_difference < 1e-5
    assert torch.allclose(outputs_of(path, *(tensor[:1] for tensor in inputs)), model(*inputs)[:1], atol=1e-5)


def test_lora_factors_are_merged(tmp_path):
    torch.manual_seed(0)
    model = lora(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), rank=2)
    with torch.no_grad():
        model[0].lora_b.weight.normal_()
    path = tmp_path / "model.pt2"
    export(model, model.state_dict(), torch.randn(3, 5), path)
    assert not any("lora" in name for name in torch.export.load(path).state_dict)
    x = torch.randn(6, 5)
    assert torch.allclose(outputs_of(path, x), model(x), atol=1e-5)


def test_of_a_run(job, parties, tmp_path):
    run = federate(**job())
    inputs = parties["north"].tensors[0]
    done = run.export(job()["build"](parties["north"])[0], inputs, tmp_path / "model.pt2")
    assert done.batches == (1, 2, 60)
    want = inputs @ run.state["weight"].T + run.state["bias"]
    assert torch.allclose(outputs_of(done.path, inputs), want, atol=1e-5)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(5, 2)

    def forward(self, x):
        return self.f(x) if x.sum() > 0 else -self.f(x)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(5, 2)

    def forward(self, x):
        return self.f(x) + torch.rand(x.shape[0], 2)


@pytest.mark.parametrize(
    ("want", "got"), [(torch.inf, 1.0), (1.0, torch.inf), (torch.inf, torch.inf), (1.0, torch.nan)]
)
def test_what_is_not_finite_is_no_match(want, got):
    model = nn.Linear(5, 1)
    model.forward = lambda x: torch.full((len(x), 1), want)
    with pytest.raises(ExportError, match="differs from the model by"):
        _compare(model, lambda part: [torch.full((len(part[0]), 1), got)], (torch.zeros(3, 5),), "a file")


@pytest.mark.parametrize(
    ("make", "inputs", "name", "error", "message"),
    [
        (Branches, torch.randn(3, 5), "model.pt2", ExportError, "cannot trace the model"),
        (Random, torch.randn(3, 5), "model.pt2", ExportError, "differs from the model by"),
        (lambda: nn.Linear(5, 2), torch.randn(3, 5), "model.bin", ConfigError, "of no known format"),
        (lambda: nn.Linear(5, 2), torch.randn(0, 5), "model.pt2", ConfigError, r"hold \[0\] records"),
        (lambda: nn.Linear(5, 2), [torch.randn(3, 5), torch.randn(2, 5)], "model.pt2", ConfigError, "one number"),
        (lambda: nn.Linear(5, 2), ["x"], "model.pt2", ConfigError, "must be the tensors"),
        (lambda: nn.Linear(5, 2), [], "model.pt2", ConfigError, "must be the tensors"),
        (lambda: nn.Linear(5, 2), torch.randn(3, 5), "there.pt2", ConfigError, "is there already"),
    ],
)
def test_what_cannot_be_exported_leaves_no_file(tmp_path, make, inputs, name, error, message):
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(error, match=message):
        export(make(), make().state_dict(), inputs, tmp_path / name)
    assert [item.name for item in tmp_path.iterdir()] == ["there.pt2"]
    assert (tmp_path / "there.pt2").read_text() == "mine"


def test_weights_of_another_model_are_refused(tmp_path):
    with pytest.raises(InitialWeightsError, match="shape"):
        export(nn.Linear(5, 2), nn.Linear(5, 3).state_dict(), torch.randn(3, 5), tmp_path / "model.pt2")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ONNX needs onnx, onnxscript, onnxruntime"):
        export(nn.Linear(5, 2), nn.Linear(5, 2).state_dict(), torch.randn(3, 5), tmp_path / "model.onnx")


SETTINGS = """
task = "{task}"
device = "cpu"
[split]
parties = 3
alpha = 2.0
[training]
rounds = 1
hidden = 4
"""


def test_the_command(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SETTINGS.format(task="digits"))
    run, out = tmp_path / "run", tmp_path / "model.onnx"
    assert main(["train", str(tmp_path / "small.toml"), "--out", str(run), "--quiet"]) == 0
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "model.onnx: round 1; largest difference" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(tmp_path / "model.pt2"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["file"], written["round"]) == (str(tmp_path / "model.pt2"), 1)
    assert 0.0 <= written["max_difference"] < 1e-4
    assert 1 in written["batches"]
    state = federate_state(run)
    pixels = torch.rand(4, 64)
    want = torch.tanh(pixels @ state["0.weight"].T + state["0.bias"]) @ state["2.weight"].T + state["2.bias"]
    assert torch.allclose(outputs_of(out, pixels), want, atol=1e-5)
    # A start for another run, by a flag
    words = ["train", str(tmp_path / "small.toml"), "--training.start", str(run / "model.safetensors")]
    assert main([*words, "--out", str(tmp_path / "second"), "--quiet"]) == 0
    assert main([*words[:-1], str(tmp_path / "gone.safetensors"), "--out", str(tmp_path / "third")]) == 2
    assert "no such file" in capsys.readouterr().err


def federate_state(folder):
    from choral import Run

    return Run.load(folder).state


def test_code_named_by_a_run_folder_is_not_run(tmp_path, capsys):
    task = tmp_path / "mine.py"
    task.write_text("from choral.trainers.data.sets.digits import load\n")
    (tmp_path / "small.toml").write_text(SETTINGS.format(task=task))
    assert main(["train", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    task.write_text("raise SystemExit('it ran')\n")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model.pt2")]) == 2
    assert "code is not run because a folder says so" in capsys.readouterr().err
    task.write_text("from choral.trainers.data.sets.digits import load\n")
    words = ["export", str(tmp_path / "run"), "--task", str(task), "--out", str(tmp_path / "model.pt2"), "--quiet"]
    assert main(words) == 0


def test_a_run_without_settings_is_for_python(job, tmp_path, capsys):
    federate(**job(), out=tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model.pt2")]) == 2
    assert "in Python: run.export(model, example_inputs, path)" in capsys.readouterr().err
