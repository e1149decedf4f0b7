"""The Hugging Face Trainer for the loop, mpitrain for communication.

    pip install transformers accelerate
    jobs/local.sh 2 python examples/with_hf_trainer.py

The Trainer takes the variables of mpirun for its own and asks for MASTER_ADDR. With `hide_launcher=True` each rank is a
single process to it, and the ranks exchange through the optimizer that they give to the Trainer.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import mpitrain

world = mpitrain.init(hide_launcher=True)  # before anything of transformers is created

torch.manual_seed(0)
tokens = torch.randint(2, 32, (512, 8))
labels = (tokens[:, 0] >= 16).long()
share = [{"input_ids": tokens[k], "labels": labels[k]} for k in range(world.rank, len(tokens), world.size)]
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes))
model.to(world.device)
base = torch.optim.Adam(model.parameters(), lr=0.01)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=10,
        per_device_train_batch_size=16,
        use_cpu=world.device == "cpu",
        max_grad_norm=0.0,  # it would clip the gradient of this rank
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    assert arguments.world_size == 1
    with mpitrain.DistributedOptimizer(base, model, mpitrain.EASGD(moving_rate=0.9 / world.size)) as optimizer:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        Trainer(model, arguments, train_dataset=share, optimizers=(optimizer, schedule)).train()
        world.barrier()
        model.eval()
        with optimizer.consensus(), torch.no_grad():
            accuracy = (model(tokens.to(world.device)).logits.argmax(1).cpu() == labels).float().mean().item()
        if world.rank == 0:
            print(f"accuracy {accuracy:.1%} on {world.size} ranks")
        world.barrier()
