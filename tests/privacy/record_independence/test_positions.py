"""Position embeddings that have no dimension for records: mended where the model computes the same, else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from choral.privacy import UnsupportedModelError
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.per_sample.model import with_per_sample_gradients

WORDS, WIDTH, STEPS = 7, 6, 5


class Reader(nn.Module):
    """Tokens and positions, put together by `add`; shape (records, STEPS) to (records, STEPS, WORDS)."""

    def __init__(self, add: Callable[[Any, torch.Tensor], torch.Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(STEPS + 1, WIDTH)
        self.drop, self.norm, self.head = nn.Dropout(dropout), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self._add = add

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.drop(self._add(self, t)))))


def flat(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(torch.arange(t.shape[1]))


def leading(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(torch.arange(t.shape[1])[None])


def by_keyword(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(input=torch.arange(t.shape[1])[None])


def expanded(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(torch.arange(t.shape[1]).expand_as(t))


def dropped(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.drop(m.wpe(torch.arange(t.shape[1])))


def of_one_row(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(torch.arange(t.shape[1])[None])[0]


def squeezed(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(torch.arange(t.shape[1])[None]).squeeze(0)


def summed(m: Any, t: torch.Tensor) -> torch.Tensor:
    return m.wte(t) + m.wpe(torch.arange(t.shape[1])[None]).sum(0)


def relative(m: Any, t: torch.Tensor) -> torch.Tensor:
    """As in T5: a table by distance, shape (steps, steps, width), turned round."""
    steps = torch.arange(t.shape[1])
    return m.wte(t) + m.wpe((steps[:, None] - steps).abs()).permute(2, 0, 1).mean(1).T


def wrapped(model: nn.Module) -> tuple[Any, PrivateOptimizer]:
    private = with_per_sample_gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        private,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
        source=os_stream,
    )
    return private, optimizer


def tokens(records: int) -> torch.Tensor:
    return torch.randint(WORDS, (records, STEPS), generator=torch.Generator().manual_seed(records))


def loss(model: nn.Module, t: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(t).flatten(0, 1), t.flatten())


@pytest.mark.parametrize("batches", [(4, STEPS, 1), (STEPS, 3), (1, STEPS, 6)], ids=str)
@pytest.mark.parametrize("add", [flat, leading, by_keyword, expanded, squeezed])
def test_each_record_gets_its_own_gradient(add: Any, batches: tuple[int, ...]) -> None:
    """Also where a batch has by chance as many records as there are positions, the first or a later one."""
    if add is squeezed and 1 in batches:
        return  # a batch of one record is squeezed away, mended or not
    model = Reader(add)
    private, optimizer = wrapped(model)
    for records in batches:
        t = tokens(records)
        optimizer.expect(records)
        loss(private, t).backward()
        found = {name: private.per_sample(p) for name, p in model.named_parameters()}
        optimizer.step()
        for i in range(records):  # in evaluation mode nothing is hooked
            alone = torch.autograd.grad(loss(model.eval(), t[i : i + 1]), list(model.parameters()))
            for (name, rows), g in zip(found.items(), alone, strict=True):
                torch.testing.assert_close(rows[i], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        model.train()


def test_evaluation_and_the_shapes_of_outputs_are_the_plain_models() -> None:
    model = Reader(leading)
    want = model(tokens(3))
    private, optimizer = wrapped(model)
    optimizer.expect(3)
    torch.testing.assert_close(private(tokens(3)), want)
    torch.testing.assert_close(private.eval()(tokens(3)), want)
    assert all(m.training is False for m in model.modules())


def test_the_check_of_a_step_finds_positions_that_it_uses_by_parts() -> None:
    model = Reader(flat)
    private, optimizer = wrapped(model)

    def by_parts(t: torch.Tensor) -> torch.Tensor:
        scores = model.head(torch.tanh(model.norm(flat(model, t))))
        return nn.functional.cross_entropy(scores.flatten(0, 1), t.flatten())

    optimizer.expect(4)
    private.check_step(by_parts, tokens(4))
    by_parts(tokens(4)).backward()
    assert private.per_sample(model.wpe.weight).shape == (4, STEPS + 1, WIDTH)
    optimizer.step()


def test_dropout_on_positions_passes() -> None:
    """With its own mask for each record, where the plain model has one for all."""
    model = Reader(dropped, dropout=0.5)
    private, optimizer = wrapped(model)
    for _ in range(2):
        optimizer.expect(4)
        loss(private, tokens(4)).backward()
        optimizer.step()
    assert model.training
    assert model.drop.training


@pytest.mark.parametrize("add", [summed, relative])
def test_a_model_that_would_compute_something_else_is_refused_with_the_line_to_change(add: Any) -> None:
    model = Reader(add)
    private, optimizer = wrapped(model)
    optimizer.expect(4)
    with pytest.raises(UnsupportedModelError, match="layer wpe is given the same for all records") as caught:
        private(tokens(4))
    assert "wpe(positions.expand(len(x), -1))" in caught.value.hint
    assert model.training


def test_a_model_that_takes_one_row_for_all_is_refused() -> None:
    """The sum of all gradients would fall on the first record; the average would be right, and the outputs, too."""
    private, optimizer = wrapped(Reader(of_one_row))
    optimizer.expect(4)
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        private(tokens(4))


def test_a_change_of_shape_is_refused() -> None:
    model = Reader(lambda m, t: leading(m, t) if m.first else flat(m, t))
    model.first = True
    private, optimizer = wrapped(model)
    optimizer.expect(4)
    loss(private, tokens(4)).backward()
    optimizer.step()
    model.first = False
    optimizer.expect(4)
    with pytest.raises(UnsupportedModelError, match="layer wpe was given the same for all records at first"):
        private(tokens(4))


def test_embeddings_of_records_are_left_alone() -> None:
    """One index for each record is no position, whatever its shape."""
    model = nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, WORDS))
    private, optimizer = wrapped(model)
    t = torch.arange(4)
    optimizer.expect(4)
    nn.functional.cross_entropy(private(t), t).backward()
    optimizer.step()
    assert private.shared == {}
