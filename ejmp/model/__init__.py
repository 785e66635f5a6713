"""The JMP model: its layers, what executes them, compiled forms, checkpoints."""
