# The command line with its CUDA build of torch:
#
#   docker build --tag omnigen-fast .
#   docker run --rm --gpus all --volume omnigen-cache:/cache --volume "$PWD:/work" \
#       --user "$(id -u):$(id -g)" omnigen-fast generate --prompt "A red cat." --out cat.png
#
# --build-arg EXTRAS=[app] adds the page. It listens on 127.0.0.1: run it with --network host.

FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# torch's wheels bring CUDA 13.0. The same release here makes the container refuse an older driver.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# Triton compiles the launchers of its kernels: a C compiler and Python's headers stay in the image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/omnigen/bin:$PATH
COPY constraints.txt /wheels/
# torch first: it changes less often than this project
RUN python3 -m venv /opt/omnigen \
    && pip install --no-cache-dir --constraint /wheels/constraints.txt torch
ARG EXTRAS=""
COPY --from=build /wheels/*.whl /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt \
    "$(echo /wheels/omnigen_fast-*.whl)$EXTRAS"

# Writable for any --user: the hub's files, Triton's kernels, and the folder for pictures.
RUN useradd --uid 10001 --no-create-home omnigen \
    && install --directory --mode 1777 /cache /work
ENV HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
VOLUME /cache
USER omnigen
WORKDIR /work
ENTRYPOINT ["omnigen-fast"]
CMD ["--help"]
