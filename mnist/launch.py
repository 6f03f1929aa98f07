"""What ``scripts/*`` run: a job under ``accelerate launch``, with options checked beforehand.

python -m mnist.launch JOB [--processes N] [options of jobs/train.py or jobs/evaluate.py]

On several nodes of a cluster it is started once on each, as slurm/job.sh does, with the address and
a free port of the first: --rendezvous ADDRESS:PORT.
"""

import argparse
import os
import sys
from pathlib import Path

from mnist.system import end_quietly_when_interrupted

if __name__ == "__main__":
    end_quietly_when_interrupted()  # before what takes long to import
from mnist.config import (
    EXIT_CODE_FILE,
    InputError,
    exit_codes,
    parse_evaluate_config,
    parse_train_config,
)
from mnist.threads import take_binding

_PARSERS = {"train.py": parse_train_config, "evaluate.py": parse_evaluate_config}


def main(script: str, arguments: list[str]) -> None:
    """Check the options, then launch; ends the process with the job's exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--rendezvous")
    try:
        ours, options = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from None
    if ours.processes is not None and ours.processes < 1:
        raise InputError(f"--processes takes 1 or more, not {ours.processes}")
    if ours.rendezvous and os.environ.get("SLURM_NODEID") != "0":
        os.environ.pop(EXIT_CODE_FILE, None)  # the job's code is that of the first node
    job = Path(script)
    if {"-h", "--help"} & set(options):
        print(
            f"scripts/{job.stem} [--processes N] [OPTIONS]: N processes; default: one per GPU, or "
            "one\n"
        )
    _PARSERS[job.name](options)  # so that a mistake is answered before anything is launched
    binding = take_binding()  # or OpenMP would bind this process, and so the job's
    from mnist.distributed import launch

    os.environ |= binding
    code = launch(script, options, ours.processes, ours.rendezvous)
    sys.exit(code)


if __name__ == "__main__":
    with exit_codes(Path(sys.argv[1]).name):
        main(sys.argv[1], sys.argv[2:])
