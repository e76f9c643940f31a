"""A run from recipe to adapter: its parts, its steps, what it needs. Begin with `finetune.py`."""
