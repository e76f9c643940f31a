"""The training step: LoRA layers, packing, forward pass, loss, optimizer, trainer."""
