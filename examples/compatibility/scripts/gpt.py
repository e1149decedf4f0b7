"""A GPT with gradient accumulation, bfloat16 autocast, clipping and a learning rate per step, as in nanoGPT's train.py.

As there, the number of micro-batches is divided by the number of ranks. The exact form has parameters in float64, which
autocast does not convert.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from examples.compatibility.harness import Outcome, Run, text

VOCABULARY, BLOCK, WIDTH, HEADS = 17, 12, 32, 2
MICRO_BATCH, ACCUMULATION, STEPS, WARM_UP = 4, 6, 40, 5


class Block(nn.Module):
    """Causal self-attention and a perceptron, each with a residual connection."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        """Return the hidden state (batch, time, width) after the block."""
        batch, time, _ = x.shape
        parts = self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(batch, time, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        """Return the loss of the next tokens."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def configure_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW, with weight decay for matrices only."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def learning_rate(step: int) -> float:
    """Return a linear warm-up and then a cosine."""
    if step < WARM_UP:
        return 1e-2 * (step + 1) / WARM_UP
    return 1e-3 + 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP))) * (1e-2 - 1e-3)


def train(run: Run) -> Outcome:
    data = text(2000, VOCABULARY)
    model = run.prepare(GPT())
    optimizer = run.distribute(configure_optimizer(model), model)
    autocast = torch.autocast("cpu", torch.bfloat16)
    draws = torch.Generator().manual_seed(3)

    def estimate_loss() -> float:
        with torch.no_grad(), autocast:
            rows = data[: BLOCK * 100].view(-1, BLOCK)
            return model(rows[:, :-1], rows[:, 1:]).item()

    before = estimate_loss()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        starts = torch.randint(len(data) - BLOCK - 1, (ACCUMULATION, MICRO_BATCH), generator=draws)
        own = run.share(starts)
        for micro in own:
            x = torch.stack([data[i : i + BLOCK] for i in micro])
            y = torch.stack([data[i + 1 : i + 1 + BLOCK] for i in micro])
            with autocast:
                loss = model(x, y) / len(own)
            loss.backward()
        run.clip_grad_norm_(optimizer, model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run.outcome(model, before, estimate_loss)
