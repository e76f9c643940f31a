"""The training step: LoRA layers, micro-batches, forward pass, loss, optimizer, trainer."""
