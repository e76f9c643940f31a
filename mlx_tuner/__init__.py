"""LoRA fine-tuning of Qwen models on Apple silicon, in MLX."""

__version__ = "0.1.0"
