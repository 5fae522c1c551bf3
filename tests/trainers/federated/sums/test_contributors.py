"""A training whose sums leave out what fewer than t parties contribute to; what does not go with it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, ConfigError, Keep, Masked, Participation, Privacy, Task, audit, federate
from choral.trainers import Training
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.sets.convex import Problem, convex_task

SUMS = Masked(corrupt=1, dropouts=1, min_survivors=3, contributors=3)


def parties() -> dict[str, TensorDataset]:
    """Feature 0 is a's alone, 1 is of three, 2 of all five."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for at, name in enumerate("abcde"):
        features = torch.randn(40, 3, generator=generator)
        features[:, 0] *= at == 0
        features[:, 1] *= at < 3
        made[name] = TensorDataset(features, (features.sum(dim=1) > 0).long())
    return made


def task(**options: Any) -> Task:
    def build(dataset: Any) -> Any:
        model = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(model.weight)
        return model, torch.optim.SGD(model.parameters(), lr=0.5, **options), DataLoader(dataset, batch_size=10)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    return Task(build=build, fit=fit, evaluate=lambda model: 0.0)


def test_what_one_party_alone_has_does_not_move_the_model() -> None:
    bare = federate(task(), parties(), rounds=2, secure_sum=Masked(corrupt=1, dropouts=1, min_survivors=3))
    kept = federate(task(), parties(), rounds=2, secure_sum=SUMS)
    assert bare.state["weight"][:, 0].abs().min() > 1e-3  # 5 times this is a's own change of it
    assert kept.state["weight"][:, 0].tolist() == [0.0, 0.0]
    # Which a itself still trained with, in each round from zero; so the others differ a little from the second on.
    assert kept.state["weight"][:, 1:].abs().min() > 1e-3
    first = federate(task(), parties(), rounds=1, secure_sum=Masked(corrupt=1, dropouts=1, min_survivors=3))
    again = federate(task(), parties(), rounds=1, secure_sum=SUMS)
    assert torch.equal(first.state["weight"][:, 1:], again.state["weight"][:, 1:])
    assert again.info.secure_sum is not None
    assert again.info.secure_sum["contributors"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"privacy": Privacy(3.0, 1e-4)}, "noise is not zero"),
        ({"privacy": ClientPrivacy(3.0, 1e-4)}, "noise is not zero"),
        ({"algorithm": "scaffold"}, "not zero where they have no data"),
    ],
)
def test_what_does_not_go_with_it(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        federate(task(), parties(), rounds=1, secure_sum=SUMS, **options)


def test_a_transcript_would_tell_of_two_sums(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transcript"):
        federate(task(), parties(), rounds=1, secure_sum=SUMS, keep=Keep(out=tmp_path, transcript="digests"))


def test_a_run_that_is_kept_has_receipts_of_what_was_published(tmp_path: Path) -> None:
    run = federate(task(), parties(), rounds=2, secure_sum=SUMS, keep=Keep(out=tmp_path / "run"))
    assert audit(run).verdict != "violated"
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_weight_decay_would_make_all_contribute() -> None:
    with pytest.raises(ConfigError, match="weight decay"):
        federate(task(weight_decay=0.01), parties(), rounds=1, secure_sum=SUMS)


def test_the_audit_counts_what_single_parties_would_have_given_away() -> None:
    """Features 0 (one party) and 1 (three): two weights each in both rounds, of six."""
    bare = federate(task(), parties(), rounds=2, secure_sum=Masked(corrupt=1, dropouts=1, min_survivors=3))
    assert [entry.contributed for entry in bare.history[1:]] == [
        {"least": 5, "moved": 6, "one": 2, "few": 4, "shown_one": 2, "shown_few": 4}
    ] * 2
    (said,) = [check for check in audit(bare).checks if check.name.startswith("No coordinate")]
    assert "4 (33.3%) were published as one party's alone" in said.finding
    assert not said.refutable
    kept = federate(task(), parties(), rounds=2, secure_sum=SUMS)
    assert [entry.contributed for entry in kept.history[1:]] == [
        {"least": 3, "moved": 6, "one": 2, "few": 2, "shown_one": 0, "shown_few": 0}
    ] * 2
    (said,) = [check for check in audit(kept).checks if check.name.startswith("No coordinate")]
    assert (said.verdict, said.refutable) == ("holds", True)
    assert "4 were one party's alone and 4 of fewer than 3: 4 of these were left out, 0 published" in said.finding
    assert federate(task(), parties(), rounds=1).history[1].contributed is None  # a plain sum hides nothing
    noisy = federate(task(), parties(), rounds=1, secure_sum=Masked(corrupt=1), privacy=Privacy(3.0, 1e-3))
    assert noisy.history[1].contributed is None


@pytest.mark.slow
@pytest.mark.parametrize("cohort", [20, 50, 100])
def test_words_of_single_authors_are_not_published_at_a_bit_a_coordinate_at_most(cohort: int) -> None:
    """Made-up posts of 1,000 authors, 20,002 words, two rounds. Without the threshold, words of one author are."""
    made = sparse_posts(parties=1000, seed=0)
    problem = Problem(made.parties, made.tests, 1e-6)
    training = Training(learning_rate=0.1, batch_size=20, local_epochs=1, weight_decay=0.0)
    posts = convex_task(problem, made.parties, training)
    posts = dataclasses.replace(posts, evaluate=lambda model: 0.0, references=None, min_classes=1)
    found = {}
    for least in (None, 5):
        sums = Masked(corrupt=3, contributors=least)
        run = federate(posts, rounds=2, secure_sum=sums, participation=Participation(cohort=cohort))
        found[least] = run.history[1:]
    for entry in found[None]:
        assert entry.contributed is not None
        assert entry.contributed["shown_one"] > 0
    for entry, bare in zip(found[5], found[None], strict=True):
        assert entry.contributed is not None
        assert entry.contributed["one"] > 0
        assert entry.contributed["shown_one"] == entry.contributed["shown_few"] == 0
        assert entry.contributed["moved"] > entry.contributed["few"]
        assert entry.bytes_up + entry.bytes_down < bare.bytes_up + bare.bytes_down + 20_002 / 8


def test_a_sum_that_shows_what_it_promised_to_leave_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from choral.protocols import contributors

    monkeypatch.setattr(contributors.np, "where", lambda dropped, nothing, vector: vector if nothing == 0 else nothing)
    run = federate(task(), parties(), rounds=1, secure_sum=SUMS)
    monkeypatch.undo()
    assert np.where([True], 0, 1).tolist() == [0]
    found = audit(run)
    assert found.verdict == "violated"
    assert any("2 published" in check.finding for check in found.checks)
