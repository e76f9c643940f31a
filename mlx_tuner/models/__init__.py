"""Models and adapters as files: checked, read, loaded, written."""
