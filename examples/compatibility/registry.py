"""The scripts of docs/compatibility.md: what each follows, needs and uses, and what to know about it."""

from __future__ import annotations

from dataclasses import dataclass

import mpitrain


@dataclass(frozen=True)
class Script:
    """A training script in the manner of a public one.

    Attributes:
        module: Its name in ``scripts/``.
        origin: The public script.
        uses: The parts of torch, and of other packages, that it combines.
        packages: What it needs besides mpitrain's own dependencies.
        remark: What a user has to know.
    """

    module: str
    origin: str
    uses: str
    packages: tuple[str, ...] = ()
    remark: str = ""


SCRIPTS = (
    Script(
        "mnist",
        "pytorch/examples, `mnist/main.py`",
        "convolutions, dropout, `Adadelta`, `StepLR`",
        remark="Dropout draws on each rank; the comparison is without.",
    ),
    Script(
        "gpt",
        "karpathy/nanoGPT, `train.py`",
        "gradient accumulation, bfloat16 `autocast`, `AdamW` with two parameter groups, a learning rate per step, "
        "clipping, tied embeddings",
        remark="Divide the number of micro-batches by the number of ranks. Clip with `optimizer.clip_grad_norm_`.",
    ),
    Script(
        "timm_ema",
        "huggingface/pytorch-image-models, `train.py`",
        "`VisionTransformer`, `create_optimizer_v2`, `CosineLRScheduler`, `ModelEmaV3`, label smoothing, clipping",
        packages=("timm",),
        remark="The EMA follows this rank's parameters: under all-reduce it is the same on all ranks, otherwise "
        "evaluate the consensus, or pass `average=mpitrain.Average(...)`. The comparison includes the EMA.",
    ),
    Script(
        "dcgan",
        "pytorch/examples, `dcgan/main.py`",
        "two models with an optimizer each, BatchNorm, `weight.data.normal_`, gradients of one model that the other's "
        "backward pass leaves",
        remark="BatchNorm uses the batch of this rank, as with DistributedDataParallel without SyncBatchNorm; the "
        "comparison has GroupNorm.",
    ),
    Script(
        "vae",
        "pytorch/examples, `vae/main.py`",
        "noise in the forward pass, a loss summed over the batch, `Adam`",
        remark="Divide a summed loss by the batch of this rank: all-reduce averages gradients.",
    ),
    Script(
        "lstm",
        "pytorch/examples, `word_language_model/main.py`",
        "tied weights, a hidden state carried from batch to batch, clipping, a learning rate that falls with the loss",
        remark="Decide on the learning rate with the mean loss of all ranks. An update written by hand "
        "(`p.data.add_`) is replaced with `SGD`.",
    ),
    Script(
        "hf_trainer",
        "huggingface/transformers, `run_glue.py`",
        "`Trainer` with an optimizer and a schedule that are passed in",
        packages=("transformers", "accelerate"),
        remark="`init(hide_launcher=True)`, `max_grad_norm=0`. Override `get_train_dataloader`, so that every rank "
        "gets its part of the data.",
    ),
    Script(
        "with_accelerate",
        "huggingface/accelerate, `nlp_example.py` and `by_feature/gradient_accumulation.py`",
        "`prepare` of model, optimizer, loader and schedule; `accumulate`",
        packages=("accelerate",),
        remark="`init(hide_launcher=True)`. `accelerator.clip_grad_norm_` clips this rank's gradient: use the "
        "optimizer's.",
    ),
    Script(
        "with_lightning",
        "Lightning-AI/pytorch-lightning, README",
        "`Trainer`, `configure_optimizers` with a schedule",
        packages=("lightning",),
        remark="`init(hide_launcher=True)`, `devices=1`. Make the optimizer in `configure_optimizers`.",
    ),
    Script(
        "sam",
        "davda54/sam, `example/train.py`",
        "two backward passes per step, parameters changed by hand, an optimizer inside another one",
        remark="`optimizer.clip_grad_norm_(math.inf)` before the ascent averages the gradients; without it every rank "
        "ascends by its own (m-sharpness).",
    ),
    Script(
        "sparse_embedding",
        "facebookresearch/dlrm, `dlrm_s_pytorch.py`",
        "`EmbeddingBag(sparse=True)`, `Adagrad`",
        remark="Sparse gradients are converted to dense ones, with a message.",
    ),
    Script(
        "compiled",
        "PyTorch tutorials, `torch_compile_tutorial`",
        "`torch.compile`, Nesterov momentum, `CosineAnnealingLR`",
        remark="`consensus()` needs no new compilation.",
    ),
)

METHODS = {
    "all-reduce": mpitrain.AllReduceSGD(),
    "EASGD": mpitrain.EASGD(period=2),
    "DiLoCo": mpitrain.DiLoCo(period=10),
}
RANKS = (1, 2, 3)

LARGEST_DEVIATION = 1e-5
"""Of a parameter after training under all-reduce, from that of one process."""

LARGEST_LOSS_FRACTION = 0.9
"""Of the loss of the consensus after training, to that before."""
