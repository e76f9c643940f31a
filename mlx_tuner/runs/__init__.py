"""A run on disk and what is told of it: records, checkpoints, report, comparison."""
