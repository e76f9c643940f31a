"""What a person can ask for besides a run."""
