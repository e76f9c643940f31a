"""What to train: the recipe's tables, its faults, its schedule."""
