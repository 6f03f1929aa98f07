# The jobs with everything they need, for CPUs and NVIDIA GPUs; BuildKit builds it (Docker 23 or newer):
#
#   docker build -t mnist .
#
#   --build-arg WITH_DATA=yes       puts MNIST into the image
#   --build-arg TORCH_INDEX=URL     torch without CUDA from this index, unhashed: a small image
#   --build-arg PYTHON_IMAGE=NAME   the base, where it is not python:3.12-slim
#   --build-arg REVISION=COMMIT     for the label
#   --secret id=pip.conf,src=FILE   pip's configuration; it stays in no layer and no history
#
# What `docker run` starts, and how it ends: scripts/container.py.

ARG PYTHON_IMAGE=python:3.12-slim

# ---- everything that requirements.txt pins; only that file's changes come here
FROM ${PYTHON_IMAGE} AS packages
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /app
ARG TORCH_INDEX=""
RUN --mount=type=bind,source=requirements.txt,target=/app/requirements.txt \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/pip-cache <<'SCRIPT'
export PIP_CACHE_DIR=/pip-cache PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
python3 -m venv .venv
if [ -z "$TORCH_INDEX" ]; then
    .venv/bin/pip install --require-hashes -r requirements.txt
    exit
fi
# Builds of torch for CPUs are other files under the same version, so the lock has no hash of them.
awk '/^[^ #]/ { left_out = /^(torch|torchvision|triton|(cuda|nvidia)-[^=]*)==/ } !left_out' \
    requirements.txt >/tmp/others.txt
sed -nE 's/^((torch|torchvision)==[^ ;]+).*/\1/p' requirements.txt >/tmp/unhashed.txt
.venv/bin/pip install --no-deps --require-hashes -r /tmp/others.txt
echo "WARNING: without verified hashes, from TORCH_INDEX: $(tr '\n' ' ' </tmp/unhashed.txt)"
.venv/bin/pip install --no-deps --index-url "$TORCH_INDEX" -r /tmp/unhashed.txt
.venv/bin/python -c 'import torch, torchvision' # a torch with CUDA fails here: its libraries lack
SCRIPT

# ---- MNIST, or an empty folder; what was fetched once comes from the cache
FROM packages AS data
ARG WITH_DATA=""
RUN --mount=type=bind,source=mnist,target=/app/mnist \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/fetched <<'SCRIPT'
mkdir data
[ -n "$WITH_DATA" ] || exit 0
.venv/bin/python -c 'import mnist.fetch, pathlib; mnist.fetch.fetch_mnist(pathlib.Path("/fetched"))'
cp -r /fetched/MNIST data
SCRIPT

# ---- the image
FROM ${PYTHON_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
LABEL org.opencontainers.image.title="mnist" \
      org.opencontainers.image.description="Train and evaluate five linear layers on MNIST with Hugging Face Accelerate" \
      org.opencontainers.image.licenses="MIT"
# Any user may write runs, data and caches: the one of `docker run --user` has no entry in passwd,
# and a new named volume starts as a copy of the folder it covers.
RUN useradd --no-log-init --uid 1000 --no-create-home mnist \
    && install -d -m 1777 /app/data /app/runs /home/mnist
WORKDIR /app
COPY --from=packages /app/.venv .venv
COPY --from=data /app/data data
ENV PATH=/app/.venv/bin:$PATH \
    HOME=/home/mnist \
    PYTHONUNBUFFERED=1 \
    PYTEST_ADDOPTS="-p no:cacheprovider" \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . .
# Whatever the builder's umask: readable. Compiled, because nobody but root can do it later.
RUN chmod -R a+rX jobs mnist scripts tests ./*.* LICENSE \
    && UV_NO_CACHE=1 scripts/setup --adopt \
    && python -m compileall -q jobs mnist \
    && rm -rf /tmp/*
ARG REVISION=""
LABEL org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
ENTRYPOINT ["/app/.venv/bin/python", "-I", "/app/scripts/container.py"]
CMD ["train"]
