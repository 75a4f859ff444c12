# The image of all pods: with `flexunet` and `ray`, without a compiler.
#
#   make image                   target cpu, as flexunet:cpu
#   make image TARGET=gpu        with the CUDA libraries of the `gpu` extra
#   make image TARGET=bucket     the bucket emulator of the overlay `cpu`, not part of flexunet
#
# BASE is any image with Python 3.11 to 3.13 and apt. For a cluster, give it by digest
# (k8s/README.md): a tag can point to another image later.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Installs from the lock file: checks the hash of every file; an outdated lock file is an error.
FROM ${BASE} AS uv
ARG UV_VERSION=0.13.9
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never \
    UV_PROJECT_ENVIRONMENT=/opt/flexunet
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==${UV_VERSION}
ENV PATH=/opt/uv/bin:${PATH}
WORKDIR /src
COPY pyproject.toml uv.lock ./

FROM uv AS dependencies-cpu
RUN uv sync --locked --no-default-groups --group current --extra dicom --no-install-project

# Only this project's code, in the same folder as its dependencies: a small layer next to gigabytes.
FROM uv AS package
COPY README.md LICENSE ./
COPY flexunet flexunet
COPY data_prep data_prep
COPY job job
COPY launcher launcher
RUN uv venv /opt/flexunet && uv pip install --no-deps --python /opt/flexunet/bin/python .

# KubeRay's probes call wget.
FROM ${BASE} AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home --home-dir /tmp flexunet
# Programs write only to /tmp and mounted volumes, so that the root can be read-only.
ENV PATH=/opt/flexunet/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="flexunet" \
      org.opencontainers.image.description="Image segmentation training on a laptop or a Ray cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
WORKDIR /tmp
CMD ["flexunet", "--help"]

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/flexunet /opt/flexunet
COPY --from=package /opt/flexunet /opt/flexunet

FROM uv AS dependencies-bucket
RUN uv sync --locked --only-group bucket

# gcp-storage-emulator ignores preconditions, which locks and commits need; the proxy of the tests
# enforces them.
FROM runtime AS bucket
COPY --from=dependencies-bucket /opt/flexunet /opt/flexunet
COPY tests/faults/proxy.py /opt/bucket/proxy.py
CMD ["python", "/opt/bucket/proxy.py", "--host", "0.0.0.0", "--port", "4443", "--bucket", "flexunet"]

FROM uv AS dependencies-gpu
RUN uv sync --locked --no-default-groups --group current --extra gpu --extra dicom --no-install-project

FROM runtime AS gpu
# GKE mounts the driver there, and the image must set the paths.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 PATH=${PATH}:/usr/local/nvidia/bin
COPY --from=dependencies-gpu /opt/flexunet /opt/flexunet
COPY --from=package /opt/flexunet /opt/flexunet
