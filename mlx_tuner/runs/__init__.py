"""A run on disk and what is told of it: records, checkpoints, identity, and its processes."""
