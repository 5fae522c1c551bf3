"""A small BERT that tells two kinds of sentences apart, trained with differential privacy by Hugging Face's Trainer.

The model is made here and so are the sentences: nothing is fetched from a hub.

    pip install 'choral[huggingface]'
    python examples/huggingface_trainer.py
"""

import random
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from choral import Privacy
from choral.privacy.huggingface import PrivateTrainer

KINDS = ("the patient was {} and could go home", "the patient was {} and had to stay")
STATES = ("well", "tired", "in pain", "free of fever", "recovering", "unsteady", "hungry", "calm")
PAD, LENGTH = 0, 12
EPOCHS = 15


def sentences(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        label = draw.randrange(2)
        yield KINDS[label].format(draw.choice(STATES)).split(), label


words = sorted({word for kind in KINDS for state in STATES for word in kind.format(state).split()})  # public


def records(count, seed):
    found = []
    for sentence, label in sentences(count, seed):
        codes = [1 + words.index(word) for word in sentence]
        padding = [PAD] * (LENGTH - len(codes))
        mask = [1] * len(codes) + padding
        found.append({"input_ids": codes + padding, "attention_mask": mask, "labels": label})
    return found


def main(out):
    set_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 1,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
    )
    arguments = TrainingArguments(
        out,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=128,
        learning_rate=1e-2,
        max_grad_norm=0,  # Privacy clips, record by record
        logging_strategy="no",  # the training loss is not protected
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = PrivateTrainer(
        model=BertForSequenceClassification(config),
        args=arguments,
        train_dataset=records(2000, seed=1),
        eval_dataset=records(200, seed=2),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        privacy=Privacy(epsilon=4.0, delta=1e-4, epochs=EPOCHS),
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    print(trainer.spent())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/huggingface")
