"""Hugging Face's Trainer, made private: gradients, losses by record, budget, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytest.importorskip("accelerate", reason="the extra huggingface is not installed")

from choral.errors import ConfigError  # noqa: E402
from choral.privacy import BudgetExceededError, Privacy, PrivacyError, UnsupportedModelError  # noqa: E402
from choral.privacy.huggingface import PrivateTrainer, _by_token  # noqa: E402

WORDS, LENGTH, RECORDS = 11, 8, 48
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def bert(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **SIZES, **settings)
    return getattr(transformers, f"BertFor{kind}")(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2)
    )


def tokens() -> torch.Tensor:
    """Counting up from a random start."""
    start = torch.randint(WORDS, (RECORDS, 1), generator=torch.Generator().manual_seed(1))
    return (start + torch.arange(LENGTH)) % WORDS


def records(kind: str) -> list[dict[str, Any]]:
    found = []
    for i, t in enumerate(tokens()):
        labels: Any = t.clone()
        if kind in ("masked", "tokens"):
            labels[
                torch.arange(LENGTH) % (i % 3 + 2) != 0
            ] = -100  # two to four of them left: a batch has no fixed number
        elif kind == "classes":
            labels = int(t[0] > 5)
        elif kind == "regression":
            labels = float(t[0]) / WORDS
        elif kind == "several":
            labels = [float(t[0] > 5), float(t[1] > 3)]
        found.append({"input_ids": t, "attention_mask": (torch.arange(LENGTH) < 5 + i % 4).long(), "labels": labels})
    return found


MODELS = {
    "causal": gpt2,
    "masked": lambda: bert("MaskedLM"),
    "tokens": lambda: bert("TokenClassification", num_labels=WORDS),
    "classes": lambda: bert("SequenceClassification"),
    "regression": lambda: bert("SequenceClassification", num_labels=1),
    "several": lambda: bert("SequenceClassification", num_labels=2),
}


def arguments(out: Any, **settings: Any) -> Any:
    quiet = {
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    usual = {"num_train_epochs": 1, "per_device_train_batch_size": 12, "max_grad_norm": 0, "learning_rate": 1e-2}
    return transformers.TrainingArguments(str(out), **(quiet | usual | settings))


def trainer(out: Any, kind: str = "classes", privacy: Privacy | None = None, **settings: Any) -> PrivateTrainer:
    special = {
        name: settings.pop(name) for name in ("callbacks", "record_losses", "compute_loss_func") if name in settings
    }
    return PrivateTrainer(
        model=special.pop("model", None) or MODELS[kind](),
        args=arguments(out, **settings),
        train_dataset=records(kind),
        privacy=privacy or Privacy(epsilon=4.0, delta=1e-3),
        **special,
    )


class Moves(transformers.TrainerCallback):
    """How each step moves the weights, flat."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        now = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        self.seen.append(now - self.before)


@pytest.mark.parametrize("share", [1.0, 0.93], ids=["the noise", "seven per cent less"])
def test_the_noise_that_was_paid_for_reaches_the_model(tmp_path: Any, share: float) -> None:
    """By chi-square over 8 steps of 2,634 weights, at most 2e-7 of false alarms; 7 % less would be noticed."""
    moves, privacy = Moves(), Privacy(epsilon=4.0, delta=1e-3, max_grad_norm=0.7, epochs=2)
    made = trainer(
        tmp_path,
        privacy=privacy,
        callbacks=[moves],
        record_losses=lambda outputs, labels: 1e-9 * F.cross_entropy(outputs.logits, labels, reduction="none"),
        num_train_epochs=2,
        learning_rate=share,
        optim="sgd",
        lr_scheduler_type="constant",
    )
    made.train()
    moved = torch.stack(moves.seen).double()
    assert moved.shape == (8, 2634)
    planned = privacy.spent().noise_multiplier * 0.7 / 12  # type: ignore[operator]
    low, high = (stats.chi2.ppf(p, moved.numel()) for p in (1e-7, 1 - 1e-7))
    ratio = float(moved.square().sum()) / planned**2
    assert (low < ratio < high * (1 + 2**-10) ** 2) == (share == 1.0), (ratio / moved.numel()) ** 0.5


class Compare(transformers.TrainerCallback):
    """Holds the per-sample gradients of a step to those of Hugging Face's own loss of each record alone."""

    def __init__(self) -> None:
        self.compared = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.optimizer.optimizer._source = lambda count: b"\xff" * count
        step = self.trainer.compute_loss

        def remembered(model: Any, inputs: Any, **settings: Any) -> Any:
            self.inputs = inputs
            return step(model, inputs, **settings)

        self.trainer.compute_loss = remembered

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.compared:
            return
        private = self.trainer._private
        rows = {name: private.per_sample(p) for name, p in model.named_parameters()}
        model.eval()
        for i in range(len(self.inputs["labels"])):
            loss = model(**{name: t[i : i + 1] for name, t in self.inputs.items()}).loss
            alone = torch.autograd.grad(loss, list(model.parameters()))
            for (name, found), g in zip(rows.items(), alone, strict=True):
                torch.testing.assert_close(found[i], g, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
                self.compared += 1
        model.train()


def without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", list(MODELS))
def test_each_kind_learns_with_the_gradients_of_its_own_loss_by_record(kind: str, tmp_path: Any) -> None:
    privacy, compare = Privacy(epsilon=4.0, delta=1e-3, epochs=8), Compare()
    private = trainer(tmp_path, kind, privacy, callbacks=[compare], num_train_epochs=8)
    compare.trainer = private
    without_dropout(private.model)
    before = private.evaluate(private.train_dataset)["eval_loss"]
    private.train()
    assert private.evaluate(private.train_dataset)["eval_loss"] < 0.9 * before
    assert compare.compared > 50
    assert private.spent().steps == 8 * 4
    assert 3.9 < private.spent().epsilon <= 4.0
    assert not any(m._forward_hooks for m in private.model.modules())  # plain again
    with pytest.raises(BudgetExceededError):
        private.train()


def test_noise_is_added(tmp_path: Any) -> None:
    weights = []
    for _ in range(2):
        private = trainer(tmp_path)
        private.train()
        weights.append(torch.cat([p.detach().flatten() for p in private.model.parameters()]))
    assert not torch.equal(*weights)


def test_the_batchs_own_mean_would_not_do() -> None:
    """What the model itself returns is another number, of which one record changes the others' share."""
    model = bert("MaskedLM").eval()
    batch = {
        name: torch.stack([torch.as_tensor(r[name]) for r in records("masked")[:6]]) for name in ("input_ids", "labels")
    }
    whole = model(**batch).loss
    alone = torch.stack([model(**{n: t[i : i + 1] for n, t in batch.items()}).loss for i in range(6)])
    logits = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(_by_token(logits, batch["labels"]), alone)
    assert abs(whole - alone.mean()) > 1e-4


def test_training_ends_with_the_budget(tmp_path: Any) -> None:
    private = trainer(tmp_path, privacy=Privacy(epsilon=4.0, delta=1e-3, epochs=2), num_train_epochs=9)
    private.train()
    assert private.state.epoch == 2
    assert private.spent().steps == 8
    assert private.spent().epsilon <= 4.0


class Leaking(transformers.TrainerCallback):
    """Changes a buffer in a way that torch does not count, from the third step on."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step >= 2:
            model.seen.data.add_(1.0)


def test_buffers_are_looked_at_at_the_end_of_a_pass(tmp_path: Any) -> None:
    private = trainer(tmp_path, callbacks=[Leaking()])
    private.model.register_buffer("seen", torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match="buffer seen"):
        private.train()


def test_empty_batches_and_a_limit_of_steps(tmp_path: Any) -> None:
    private = trainer(
        tmp_path, privacy=Privacy(epsilon=4.0, delta=1e-3, epochs=2), num_train_epochs=2, per_device_train_batch_size=1
    )
    private.train()
    assert private.spent().steps == 2 * RECORDS
    assert 40 < private.state.global_step < 80  # 61 expected
    private = trainer(tmp_path, max_steps=2)
    private.train()
    assert private.state.global_step == 2
    assert private.spent().steps == 4  # a pass is paid for as a whole


def test_checkpoints_hold_the_plain_model(tmp_path: Any) -> None:
    private = trainer(tmp_path, save_strategy="epoch")
    private.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    again = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), private.model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        private.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0"),
        ({"bf16": True}, "bf16"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"torch_compile": True}, "torch_compile"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length"),
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
    ],
)
def test_arguments_that_cannot_be_had_are_named(settings: dict[str, Any], name: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        trainer(tmp_path, **settings)
    assert caught.value.hint


def test_losses_that_are_not_by_record_are_refused(tmp_path: Any) -> None:
    private = trainer(tmp_path, record_losses=lambda outputs, labels: F.cross_entropy(outputs.logits, labels))
    with pytest.raises(ConfigError, match="record_losses gave shape"):
        private.train()
    with pytest.raises(ConfigError, match="BertModel is not known record by record") as caught:
        PrivateTrainer(
            model=transformers.BertModel(transformers.BertConfig(vocab_size=WORDS, **SIZES)),
            args=arguments(tmp_path),
            privacy=Privacy(epsilon=4.0, delta=1e-3),
        )
    assert "record_losses" in caught.value.hint
    with pytest.raises(ConfigError, match=r"expected a choral\.Privacy"):
        PrivateTrainer(model=bert("MaskedLM"), args=arguments(tmp_path), privacy=3.0)


def test_unused_parameters_are_named(tmp_path: Any) -> None:
    """As anywhere: a BERT whose pooler the loss does not use."""
    private = trainer(tmp_path)
    private.model.spare = torch.nn.Linear(2, 2)
    with pytest.raises((UnsupportedModelError, PrivacyError), match="spare"):
        private.train()
