"""The machine under it: files, device, Hub, signals."""
