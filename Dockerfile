# An image with Vestige, for a CPU or for CUDA:
#
#     docker build --tag vestige .
#     docker build --tag vestige-cuda --build-arg BASE=cuda .
#     docker run --rm --volume "$PWD:/work" vestige doctor --model MODEL --data train.jsonl
#
# BASE is `cpu` or `cuda`; EXTRAS is what `vestige[...]` takes, such as `gguf,ray,quantize`.
ARG BASE=cpu

FROM python:3.11-slim AS cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch from the Python package index brings its own CUDA libraries; the image tells the container runtime to give GPUs.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04 AS cuda
ENV TORCH_INDEX=https://pypi.org/simple
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM ${BASE}
ARG EXTRAS=gguf,ray
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/vestige
COPY constraints.txt ./
# torch comes first and alone, so that nothing else decides which build of it is taken.
RUN pip install --no-cache-dir --constraint constraints.txt --index-url "$TORCH_INDEX" \
    --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY recipes ./recipes
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" ./recipes
WORKDIR /work
ENTRYPOINT ["vestige"]
