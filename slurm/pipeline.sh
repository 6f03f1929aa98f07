#!/usr/bin/env bash
# Trains, then evaluates if that succeeded: slurm/pipeline.sh [options of jobs/train.py]
#
# Prints the ids of the two jobs. Options of sbatch, for both jobs, come first and end with --:
#
#   slurm/pipeline.sh --nodes=2 -- --recipe fast
set -euo pipefail

root=${MNIST_ROOT:-$(CDPATH='' cd -- "$(dirname -- "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)}
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh"

cluster=()
for ((i = 1; i <= $#; i++)); do
    if [ "${!i}" = -- ]; then
        cluster=("${@:1:i-1}")
        shift "$i"
        break
    fi
done
set -- --evaluate none --runs-dir "$MNIST_RUNS_DIR" "$@"
# Before anything is submitted: a mistake in the options, and where the run will be.
run=$("${python[@]}" -P - "$@" <<'END'
import os, sys
from mnist.cli import exit_codes
from mnist.training.config import parse_train_config
with exit_codes("train.py"):
    run = parse_train_config(sys.argv[1:]).run_folder
    sys.stdout.buffer.write(os.fsencode(run))  # its bytes, whatever the locale
END
)
submit() { sbatch --parsable ${cluster[@]+"${cluster[@]}"} "$@"; }
train=$(submit "$root/slurm/train.sbatch" "$@")
# --kill-on-invalid-dep: else a training that fails would leave it pending for ever.
evaluate=$(submit --dependency="afterok:${train%%;*}" --kill-on-invalid-dep=yes \
    "$root/slurm/evaluate.sbatch" --run "$run")
echo "training $train, then evaluation $evaluate: $run"
