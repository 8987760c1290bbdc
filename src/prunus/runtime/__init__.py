"""Where processes, checkpoints and messages meet: runner, launcher, worker, controller, broker process, daemon, CLI."""
