# The image to train in: environment, package and command; docs/containers.md says how to build, run and change it.
#
#   docker build -t fmcib_ssl .                                                    torch's default build (CUDA on x86-64)
#   docker build -t fmcib_ssl:cpu --build-arg TORCH_INDEX_URL=INDEX .               the build of another index, PyTorch's for CPUs say

# Any image with Python 3.11 to 3.13 and pip. Every stage starts from it, so that the environment made in one runs in another.
ARG BASE_IMAGE=python:3.11-slim

# What fmcib_ssl needs. Several GB, so made from pyproject.toml and the constraints alone: a change of code leaves it cached.
FROM ${BASE_IMAGE} AS dependencies
# An index with another build of torch and torchvision; empty: the default one's.
ARG TORCH_INDEX_URL=""
ENV PATH=/opt/venv/bin:$PATH \
    PIP_CONFIG_FILE=/run/secrets/pip_conf
WORKDIR /build
RUN python -m venv /opt/venv
COPY requirements/constraints.txt ./
# --no-deps: such an index has torch's own dependencies in versions of its choice. The next step takes them from the usual one,
# free of the pins of CUDA libraries, which belong to the default build.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf \
    if [ -n "${TORCH_INDEX_URL}" ]; then \
      pip install --no-deps --index-url "${TORCH_INDEX_URL}" --constraint constraints.txt torch torchvision \
      && sed -i -E '/^(cuda|nvidia)-/d' constraints.txt; \
    fi
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# fmcib_ssl itself, as a wheel.
FROM ${BASE_IMAGE} AS wheel
ENV PIP_CONFIG_FILE=/run/secrets/pip_conf
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY fmcib_ssl fmcib_ssl
COPY configs configs
COPY scripts/slurm scripts/slurm
COPY hydra_plugins hydra_plugins
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf \
    pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
# Users are numbers here: the image runs under any UID, and most have no entry in its /etc/passwd. USER answers those who ask for
# a name all the same (torch's compiler, W&B); under HOME go the caches of matplotlib, torch, Triton and W&B.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=fmcib_ssl \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/mnt \
    pip install --no-deps --no-index --no-cache-dir /mnt/*.whl
# The commit that the image was made from. Last, because it changes most often.
ARG REVISION=""
ENV FMCIB_SSL_REVISION=${REVISION}
LABEL org.opencontainers.image.title="fmcib_ssl" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"

# The one folder that is written to: mount yours over it. Without a mount a run stops at once instead of losing its results.
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["fmcib-ssl"]
CMD ["--help"]
