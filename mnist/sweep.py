"""What an array calls at its end that was submitted before this package had rooms: SLURM keeps the
script as it was then."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mnist.runs.sweep", run_name="__main__")
