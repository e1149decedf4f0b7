"""The benchmark of training steps: the bars of the GPT, and what its candidates compute."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training import steps


def rows(**of_alone: float) -> list[dict[str, object]]:
    names = {"allreduce": "allreduce", "easgd": "easgd, tau 10", "diloco": "diloco, tau 10", "ddp": "DDP, gloo"}
    return [{"model": "gpt", "step": names[name], "of_alone": ratio} for name, ratio in of_alone.items()]


@pytest.mark.parametrize(
    ("allreduce", "easgd", "diloco", "passed"),
    [(1.06, 1.03, 1.03, [True, True, True]), (1.07, 1.02, 1.04, [False, True, False])],
)
def test_the_bars_of_the_gpt(allreduce, easgd, diloco, passed):
    found = steps.verdicts(rows(allreduce=allreduce, easgd=easgd, diloco=diloco, ddp=1.4), 2)
    assert [bar["passed"] for bar in found] == passed
    assert steps.verdicts(rows(allreduce=allreduce, easgd=easgd, diloco=diloco), 3) == []


def test_a_step_of_the_gpt_is_adamw_on_the_cross_entropy_of_tokens():
    batches = [steps.tokens_of(torch.Generator().manual_seed(k)) for k in range(2)]
    assert batches[0][0].shape == (steps.SEQUENCES, steps.CONTEXT)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Embedding(steps.VOCABULARY, steps.VOCABULARY)

    ours, theirs = model(), model()
    step, optimizer = steps.step_of(ours, steps.adamw(ours), batches), torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    for x, y in batches:
        step()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x).transpose(1, 2), y).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
