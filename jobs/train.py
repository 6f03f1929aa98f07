"""Train an MLP of five linear layers on MNIST.

accelerate launch jobs/train.py                     # all GPUs, or else all CPU cores
accelerate launch jobs/train.py --recipe fast       # the shortest time to 98.16%
scripts/train --processes 2                         # two processes, on CPUs too
"""

import contextlib
import os
import sys

from mnist.system import die_with_launcher, end_quietly_when_interrupted

if __name__ == "__main__":
    end_quietly_when_interrupted()  # before what takes long to import
    from mnist.cli import exit_codes
    from mnist.training.config import parse_train_config

    with exit_codes("train.py"):
        die_with_launcher()
        config = parse_train_config(sys.argv[1:])
        from mnist.figures import Painter
        from mnist.runs.mirror import NoMirror, WandbSettings, open_mirror
        from mnist.threads import surroundings

        surroundings()  # before torch is imported
        is_main = os.environ.get("RANK", "0") == "0"
        # They import Matplotlib and W&B on another core while this process imports torch.
        mirror = open_mirror(WandbSettings.of(config)) if is_main else NoMirror()
        with Painter() if is_main else contextlib.nullcontext() as painter:
            from mnist.training.job import train

            train(config, painter, mirror)
