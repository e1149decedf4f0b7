"""BERT for classification in the Trainer of transformers, with a linear schedule, as in run_glue.py of its examples."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, get_scheduler

from examples.compatibility.harness import Outcome, Run

N, STEPS = 384, 48


class Tokens(torch.utils.data.Dataset):
    """Sequences of tokens whose first token decides the class."""

    def __init__(self):
        self.tokens = torch.randint(2, 32, (N, 8), generator=torch.Generator().manual_seed(2))
        self.labels = (self.tokens[:, 0] >= 16).long()

    def __len__(self):
        return N

    def __getitem__(self, k):
        return {"input_ids": self.tokens[k], "labels": self.labels[k]}


class DistributedTrainer(Trainer):
    """A Trainer that gives every rank its part of each batch."""

    def __init__(self, run: Run, *arguments, **settings):
        self._run = run
        super().__init__(*arguments, **settings)

    def get_train_dataloader(self):
        """Return this rank's loader."""
        return self._run.loader(self.train_dataset, batch_size=48)


def train(run: Run) -> Outcome:
    data = Tokens()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = run.prepare(BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes)))
    optimizer = run.distribute(torch.optim.AdamW(model.parameters(), lr=0.02), model)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=STEPS)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return model(input_ids=data.tokens, labels=data.labels).loss.item()

    before = evaluate()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            max_grad_norm=0.0,  # it would clip the gradient of this rank
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = DistributedTrainer(run, model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train()
    return run.outcome(model, before, evaluate)
