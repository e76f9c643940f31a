"""LoRA fine-tuning of Qwen models on Apple silicon, in MLX.

    from mlx_tuner import finetune, generate, load_recipe

    summary = finetune(load_recipe("mine.toml", overrides=["lora.rank=8"]), "adapters/mine")
    print(generate(summary.run, "Write a function that sorts."))

What goes wrong for a user is a `mlx_tuner.errors.TunerError`, whose text is the command line's.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_tuner.api import finetune, generate
    from mlx_tuner.recipe.load import load_recipe
    from mlx_tuner.recipe.tables import Recipe

# MLX rounds fp32 products to TF32 on M5 and CUDA (errors of 8e-4, not 3e-7) unless told not to
# before its first one. Fusing, checking and the gradients of the factors are fp32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
if sys.platform == "darwin":
    # Metal ends work that keeps the display waiting; this, set before it starts, lets it wait.
    os.environ.setdefault("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")

__version__ = "0.2.0"
__all__ = ["Recipe", "finetune", "generate", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: importing the package loads no MLX."""
    if name == "Recipe":
        from mlx_tuner.recipe.tables import Recipe

        return Recipe
    if name == "load_recipe":
        from mlx_tuner.recipe.load import load_recipe

        return load_recipe
    if name in ("finetune", "generate"):
        from mlx_tuner import api

        return getattr(api, name)
    raise AttributeError(f"module 'mlx_tuner' has no attribute {name!r}")
