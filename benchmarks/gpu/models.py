"""The models of the GPU benchmark: a ResNet-20 on images and a small GPT on bytes, both with random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpitrain import models

Batch = tuple[Tensor, Tensor]

IMAGE, CLASSES = (3, 32, 32), 10
VOCABULARY = 256  # bytes


class Block(nn.Module):
    """A transformer block: causal attention and a perceptron, each residual and behind a layer norm.

    Args:
        width: Of the vector of a token.
        n_heads: Of the attention; they share the width.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self._n_heads = n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, width)"""
        b, t, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(b, t, 3, self._n_heads, width // self._n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (b, heads, t, width of a head) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.perceptron(self.norms[1](x))


class GPT(nn.Module):
    """A transformer that predicts the next token.

    Source: Radford, Wu, Child, Luan, Amodei, Sutskever, Language models are unsupervised multitask learners, 2019,
    section 2.3. Without dropout, and input and output embeddings are two.

    Args:
        n_layers: Blocks.
        width: Of the vector of a token.
        n_heads: Of the attention.
        n_tokens: Of a sequence, at most.
    """

    def __init__(self, n_layers: int = 6, width: int = 384, n_heads: int = 6, n_tokens: int = 256) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(n_tokens, width)
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, t) int64 -> (b, vocabulary, t) logits, as cross_entropy wants them."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))
        return logits.transpose(1, 2)


@dataclass(frozen=True)
class Task:
    """A model and its training data.

    Attributes:
        model: Makes one, on the host, always with the same weights.
        batch: Makes a mini-batch on the host, from a generator.
        optimizer: The plain torch optimizer for it.
        n_samples: Of a mini-batch.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    n_samples: int


def resnet20(n_images: int = 128) -> Task:
    """Return the task of a ResNet-20 on 32 x 32 images, with SGD and momentum."""

    def batch(generator: torch.Generator) -> Batch:
        images = torch.randn(n_images, *IMAGE, generator=generator)
        return images, torch.randint(CLASSES, (n_images,), generator=generator)

    return Task(
        lambda: models.build("resnet20", shape=IMAGE, n_classes=CLASSES, seed=0),
        batch,
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        n_images,
    )


def gpt(n_sequences: int = 32, n_tokens: int = 256, n_layers: int = 6, width: int = 384, n_heads: int = 6) -> Task:
    """Return the task of a GPT on byte sequences, with AdamW."""

    def batch(generator: torch.Generator) -> Batch:
        tokens = torch.randint(VOCABULARY, (n_sequences, n_tokens + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return GPT(n_layers, width, n_heads, n_tokens)

    return Task(model, batch, lambda m: torch.optim.AdamW(m.parameters(), lr=3e-4), n_sequences)


TASKS: dict[str, Callable[[], Task]] = {"resnet20": resnet20, "gpt": gpt}
