"""An LSTM language model with tied weights, a carried hidden state and clipping, as in pytorch/examples,
word_language_model/main.py.

There the update is written by hand; here an SGD of torch makes it. The columns of the text are divided among the ranks.
All ranks lower the learning rate together.
"""

import torch
import torch.nn.functional as F
from torch import nn

from examples.compatibility.harness import Outcome, Run, text

VOCABULARY, WIDTH, COLUMNS, BPTT = 19, 24, 12, 10


class RNNModel(nn.Module):
    """An embedding, an LSTM, and a decoder with the weights of the embedding."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.5, 0.5)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens, hidden):
        """Return the scores of the next tokens, and the hidden state."""
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)).flatten(0, 1), hidden

    def init_hidden(self, columns):
        """Return zeros."""
        weight = next(self.parameters())
        return weight.new_zeros(1, columns, WIDTH), weight.new_zeros(1, columns, WIDTH)


def repackage_hidden(hidden):
    """Detach hidden states from their history."""
    return hidden.detach() if isinstance(hidden, torch.Tensor) else tuple(repackage_hidden(h) for h in hidden)


def train(run: Run) -> Outcome:
    corpus = text(COLUMNS * 121, VOCABULARY).view(COLUMNS, -1).t()
    model = run.prepare(RNNModel())
    optimizer = run.distribute(torch.optim.SGD(model.parameters(), lr=5.0), model)
    own = run.share(corpus, dim=1)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return F.cross_entropy(model(corpus[:-1], model.init_hidden(COLUMNS))[0], corpus[1:].flatten()).item()

    before = best = evaluate()
    for _ in range(6):
        model.train()
        hidden = model.init_hidden(own.shape[1])
        for i in range(0, len(own) - 1, BPTT):
            data, targets = own[i : i + BPTT], own[i + 1 : i + 1 + BPTT].flatten()
            hidden = repackage_hidden(hidden)
            model.zero_grad()
            output, hidden = model(data[: len(targets) // own.shape[1]], hidden)
            F.cross_entropy(output, targets).backward()
            run.clip_grad_norm_(optimizer, model.parameters(), 1.0)
            optimizer.step()
        loss = run.mean(evaluate())  # of all ranks, so that all use the same learning rate
        if loss < best:
            best = loss
        else:
            optimizer.param_groups[0]["lr"] /= 4.0
    return run.outcome(model, before, evaluate)
