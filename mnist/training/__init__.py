"""The training job: settings, the loop, the step, distortions. What it leaves is in ``runs``."""
