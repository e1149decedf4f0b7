"""A decoder-only Transformer that predicts the next token.

Source: Radford, Wu, Child, Luan, Amodei, Sutskever, Language Models are Unsupervised Multitask Learners, 2019 (GPT-2),
section 2.3, and Karpathy's nanoGPT. Blocks normalise their input (pre-norm), and a final normalisation follows the last
block. Weights are normal with deviation 0.02, divided by sqrt(2*layers) for the projections back to the residual
stream. The output layer is the embedding of tokens (Press and Wolf 2017, arXiv 1608.05859).

    h   <- E[t] + P
    h   <- h + attention(norm(h))
    h   <- h + W2 gelu(W1 norm(h))
    logits = norm(h) E^T
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpitrain.data.option_parsing import between, parse_options, positive
from mpitrain.errors import UsageError

DEVIATION = 0.02
EXPANSION = 4  # width of the hidden layer of a block, in widths of the model
OPTIONS = {"layers": positive, "heads": positive, "width": positive, "context": positive, "dropout": between(0, 1)}


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, T, width) to (b, T, width); position t reads positions up to t."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.project(y.transpose(1, 2).reshape(b, t, width))
        return projected


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, EXPANSION * width)
        self.project = nn.Linear(EXPANSION * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, T, width) to (b, T, width)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        y = functional.gelu(self.expand(self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.project(y))


class GPT(nn.Module):
    """A Transformer for sequences of at most T tokens.

    Args:
        shape: The shape of one input, (T,): the context.
        n_classes: The size of the vocabulary.
        layers: The number of blocks.
        heads: The number of attention heads of a block; it divides the width.
        width: The length of the vector of a position.
        context: The context T; if given, equal to ``shape``.
        dropout: The probability with which training drops an activation.

    Raises:
        UsageError: The heads do not divide the width.
    """

    takes_tokens = True

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        n_classes: int,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"gpt: {heads} heads do not divide a width of {width}: choose a multiple as the width")
        if len(shape) != 1:
            raise UsageError(f"gpt needs sequences of tokens (T,), the data is {'x'.join(map(str, shape))}")
        assert context in (None, shape[0])
        self.tokens = nn.Embedding(n_classes, width)
        self.positions = nn.Embedding(shape[0], width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                is_residual = name.endswith("project.weight")
                nn.init.normal_(parameter, std=DEVIATION / math.sqrt(2 * layers) if is_residual else DEVIATION)

    @staticmethod
    def read_options(text: str) -> dict[str, Any]:
        """Parse the text after `gpt:`, such as `layers=6,width=192`, into keyword arguments."""
        return parse_options(text, OPTIONS, owner="gpt")

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (b, t) with t <= T to logits (b, t, n_classes) of the token after each of them."""
        h = self.dropout(self.tokens(x) + self.positions.weight[: x.shape[1]])
        return functional.linear(self.norm(self.blocks(h)), self.tokens.weight)

    @torch.no_grad()
    def generate(
        self, x: Tensor, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue sequences of tokens. Local.

        Args:
            x: (b, t) tokens, t >= 1.
            n: The number of tokens to add.
            temperature: The divisor of the logits; small values prefer likely tokens.
            generator: The random generator; torch's default if None.

        Returns:
            (b, t + n) tokens.
        """
        context = len(self.positions.weight)
        for _ in range(n):
            probabilities = torch.softmax(self(x[:, -context:])[:, -1] / temperature, dim=-1)
            x = torch.cat([x, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        return x
