"""Whether a machine's device computes what its CPU computes."""
