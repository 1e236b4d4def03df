"""One module for each command of `vqvit.cli`. Heavy imports happen inside `run`."""
