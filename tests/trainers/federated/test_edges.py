"""Models, batches and evaluations at the edge of what is taken; runs that go on."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from choral import Run
from choral.errors import ConfigError
from choral.trainers import Schedule, TaskError
from choral.trainers.task.device_batches import moved_to, tensors_of

BOTH = [federate, centralize]


class Normed(nn.Module):
    def __init__(self, norm, keeps_eval=False):
        super().__init__()
        self.first, self.norm, self.last, self.keeps_eval = nn.Linear(5, 4), norm, nn.Linear(4, 2), keeps_eval

    def forward(self, points):
        return self.last(self.norm(self.first(points)))

    def train(self, mode=True):
        super().train(mode)
        if self.keeps_eval:
            self.norm.eval()
        return self


def _with(norm, *, keeps_eval=False, frozen=False):
    def build(dataset):
        model = Normed(norm(), keeps_eval)
        model.norm.requires_grad_(not frozen)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    return build


@pytest.mark.parametrize("train", BOTH)
def test_batch_norm_without_statistics_or_in_eval_mode_is_taken(job, train):
    evaluate = {"evaluate": lambda model: 0.5}
    without = _with(lambda: nn.BatchNorm1d(4, track_running_stats=False))
    assert train(**job(build=without, **evaluate)).finished
    frozen = _with(lambda: nn.BatchNorm1d(4), keeps_eval=True, frozen=True)
    run = train(**job(build=frozen, **evaluate))
    assert torch.equal(run.state["norm.running_mean"], torch.zeros(4))
    with pytest.raises(ConfigError, match="running statistics mix"):
        train(**job(build=_with(lambda: nn.BatchNorm1d(4)), **evaluate))
    with pytest.raises(ConfigError, match=r"frozen weights, but model\.train\(\)"):
        train(**job(build=_with(lambda: nn.BatchNorm1d(4), frozen=True), **evaluate))


@pytest.mark.parametrize("train", BOTH)
def test_an_infinite_metric_is_recorded_as_the_largest_number(job, train, tmp_path):
    values = iter([float("inf"), 8.0, float("-inf"), 2.0])
    train(**job(evaluate=lambda model: {"perplexity": next(values)}), out=tmp_path / "run")
    found = [entry.metrics["perplexity"] for entry in Run.load(tmp_path / "run").history]
    assert found == [sys.float_info.max, 8.0, -sys.float_info.max, 2.0]
    with pytest.raises(TaskError, match="nan for 'accuracy'"):
        train(**job(evaluate=lambda model: float("nan")))


@pytest.mark.parametrize("train", BOTH)
def test_a_run_can_be_given_more_rounds(job, train, tmp_path):
    settings = [{"training": {"rounds": number, "batch_size": 10}} for number in (2, 4)]
    train(**job(rounds=2), out=tmp_path / "run", config=settings[0])
    more = train(**job(rounds=4), out=tmp_path / "run", config=settings[1], resume=True)
    whole = train(**job(rounds=4))
    assert [entry.round for entry in more.history] == [0, 1, 2, 3, 4]
    assert all(torch.equal(more.state[name], whole.state[name]) for name in whole.state)
    assert Run.load(tmp_path / "run").info.rounds == 4
    with pytest.raises(ConfigError, match="rounds"):
        train(**job(rounds=3), out=tmp_path / "run", resume=True)


def test_a_schedule_over_all_rounds_keeps_their_number(job, tmp_path):
    schedule = Schedule(kind="cosine")
    federate(**job(rounds=2), schedule=schedule, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="rounds"):
        federate(**job(rounds=4), schedule=schedule, out=tmp_path / "run", resume=True)


@dataclass
class Batch:
    points: torch.Tensor
    name: str


def test_packed_sequences_and_dataclasses_go_to_another_device():
    packed = pack_sequence([torch.ones(3, 2), torch.zeros(1, 2), torch.ones(2, 2)], enforce_sorted=False)
    moved = moved_to({"words": (packed, 3), "more": [Batch(torch.ones(2), "x")]}, torch.device("meta"))
    sequence = moved["words"][0]
    assert type(sequence) is type(packed)
    assert {t.device.type for t in (sequence.data, sequence.sorted_indices, sequence.unsorted_indices)} == {"meta"}
    assert torch.equal(sequence.batch_sizes, packed.batch_sizes)
    assert moved["more"][0].points.device.type == "meta"
    assert moved["more"][0].name == "x"
    assert len(tensors_of(packed)) == 3
