#!/usr/bin/env bash
# What a site sets, for all jobs of this folder. Here, or in the environment of sbatch, which wins.
#
# Partition, account, time limit, cores and GPUs are SLURM's own: options of sbatch, or its variables
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_GPUS_PER_NODE and so on.

# A file to source first, e.g. with `module load cuda`; none by default.
: "${MNIST_PROFILE:=}"

# A Python with what requirements.txt lists, on every node: a path, or a command in as many words as
# it takes, e.g. 'apptainer exec --nv "/shared/my images/mnist.sif" python', quoted as in a shell. By
# default the one that scripts/setup makes.
: "${MNIST_PYTHON:=}"

# On storage that all nodes share; relative to where sbatch is called, as all paths are.
: "${MNIST_RUNS_DIR:=runs}"
: "${MNIST_DATA_DIR:=data}"

# How often in a row a job may end without having saved (a bug, a lost process; not bad input, which
# is never tried again) before it is given up. A lost node that SLURM sees first is not counted.
: "${MNIST_FAILURES:=3}"

# Where a node's name leads to the wrong network: export GLOO_SOCKET_IFNAME=… (CPUs) or
# NCCL_SOCKET_IFNAME=… (GPUs).
