"""Load a GPT that `mpitrain train` has written, in plain torch, and continue a text.

    python examples/gpt/generate.py runs/gpt-allreduce/model.safetensors --prompt 'The "with" statement'

The file holds the tensors of the model. Neither mpitrain nor MPI is needed: the few lines below are the model.
"""

import argparse
import math

import torch
from safetensors.torch import load_file
from torch.nn import functional


def logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the logits (T, vocabulary) of the token after each of the tokens (T,)."""

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(h, h.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    h = weights["tokens.weight"][tokens] + weights["positions.weight"][: len(tokens)]
    n_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for block in (f"blocks.{k}" for k in range(n_layers)):
        parts = linear(norm(h, f"{block}.norm1"), f"{block}.attention.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in parts)
        y = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        h = h + linear(y.transpose(0, 1).flatten(1), f"{block}.attention.project")
        y = functional.gelu(linear(norm(h, f"{block}.norm2"), f"{block}.expand"), approximate="tanh")
        h = h + linear(y, f"{block}.project")
    return norm(h, "norm") @ weights["tokens.weight"].T


def main() -> None:
    """Print the text."""
    parser = argparse.ArgumentParser(description="Continue a text.")
    parser.add_argument("model", help="model.safetensors of a GPT whose tokens are bytes")
    parser.add_argument("--prompt", default='The "', help="beginning of the text (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--length", type=int, default=300, help="bytes to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="divisor of the logits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    options = parser.parse_args()
    weights, generator = load_file(options.model), torch.Generator().manual_seed(options.seed)
    context, tokens = len(weights["positions.weight"]), torch.tensor(list(options.prompt.encode()))
    surprise = 0.0
    for _ in range(options.length):
        probabilities = torch.softmax(logits(weights, tokens[-context:], options.heads)[-1] / options.temperature, -1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        surprise -= math.log(float(probabilities[drawn]))
        tokens = torch.cat([tokens, drawn])
    print(bytes(tokens.tolist()).decode(errors="replace"))
    print(f"({options.length} bytes, perplexity of the draws {math.exp(surprise / options.length):.2f})")


if __name__ == "__main__":
    main()
