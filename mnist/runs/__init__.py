"""What a run leaves behind: its folder, checkpoints, rows and reports, its copy in W&B, sweeps."""
