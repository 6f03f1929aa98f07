"""Score a model on MNIST or on images of your own, and report how good it is.

accelerate launch jobs/evaluate.py --run runs/NAME                         # MNIST's test images
accelerate launch jobs/evaluate.py --run runs/NAME --images digits.npy     # your own
scripts/evaluate --processes 2 --model FILE                                # two processes
"""

import sys

from mnist.system import die_with_launcher, end_quietly_when_interrupted

if __name__ == "__main__":
    end_quietly_when_interrupted()  # before what takes long to import
    from mnist.cli import exit_codes
    from mnist.evaluation.config import parse_evaluate_config

    with exit_codes("evaluate.py"):
        die_with_launcher()
        config = parse_evaluate_config(sys.argv[1:])
        from mnist.threads import surroundings

        surroundings()  # before torch is imported
        from mnist.evaluation.job import evaluate

        evaluate(config)
