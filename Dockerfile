# ffnas in a container, kernels built. On a CPU:
#
#   docker build -t ffnas .
#   docker run --rm -v "$PWD:/work" ffnas search --data.train train.csv --data.dev dev.csv
#
# With CUDA (the base has nvcc; kernels are compiled for sm_80 and sm_90a without a GPU being there):
#
#   docker build -t ffnas:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
#   docker run --rm --gpus all -v "$PWD:/work" ffnas:cuda search --preset gpu --data.task glue/mnli
#
# TORCH is what pip installs as PyTorch, `make setup`'s variable of that name.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG TORCH=torch==2.13.0

# A C++ compiler for the CPU kernels, C and Python's headers for Triton; Python itself where the base has none.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && (command -v python3 >/dev/null || apt-get install -y --no-install-recommends python3 python3-venv python3-dev) \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ffnas
COPY . .
RUN PIP_NO_CACHE_DIR=1 make setup TORCH="${TORCH}"

# Runs and caches belong to whoever runs the container: `-v "$PWD:/work" -v ffnas-cache:/cache --user "$(id -u)"`.
ENV PATH=/opt/ffnas/.venv/bin:$PATH \
    FFNAS_CACHE=/cache/ffnas \
    HF_HOME=/cache/huggingface
RUN mkdir -p /cache /work && chmod 1777 /cache /work
WORKDIR /work
ENTRYPOINT ["ffnas"]
CMD ["--help"]
