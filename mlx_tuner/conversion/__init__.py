"""Models for elsewhere: converted, fused, exported, each compared with its source."""
