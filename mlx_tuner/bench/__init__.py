"""What this machine can do: workloads, measured speed, sweeps, and their report."""
