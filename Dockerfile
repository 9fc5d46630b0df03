# A minisrv server in a container, for a CPU or an NVIDIA GPU:
#
#   docker build -t minisrv:cpu .
#   docker build -t minisrv:gpu --build-arg VARIANT=gpu .
#   docker run --rm -p 8000:8000 minisrv:cpu
#   docker run --rm -p 8000:8000 --gpus all -v hub:/home/minisrv/.cache/huggingface minisrv:gpu \
#       serve --host 0.0.0.0 Qwen/Qwen3-0.6B
#
# docs/deploy.md says what to mount, which flags to give, and how large the images are.

ARG PYTHON=3.12
# cpu or gpu: which build of torch is installed. cpu has the CPU's kernels compiled ahead.
ARG VARIANT=cpu

FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /src
RUN pip install --no-cache-dir build==1.3.0
COPY pyproject.toml README.md LICENSE ./
COPY minisrv minisrv
COPY loadgen loadgen
COPY models models
RUN python -m build --wheel --outdir /wheels

FROM python:${PYTHON}-slim-bookworm AS base
# cc compiles the kernels of a CPU, and what Triton launches kernels with on a GPU; g++ is for
# --compilation-mode.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/minisrv PATH=/opt/minisrv/bin:$PATH
RUN python -m venv "$VIRTUAL_ENV" && useradd --uid 10001 --create-home minisrv
# The range of torch is that of pyproject.toml; name a release by --build-arg TORCH='torch==2.13.0'.

FROM base AS cpu
ARG TORCH="torch>=2.11,<2.14"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$TORCH" --index-url "$TORCH_INDEX"

FROM base AS gpu
ARG TORCH="torch>=2.11,<2.14"
# The default index has the build for CUDA, with Triton and CUDA's libraries; the driver is the
# host's, which --gpus brings into the container.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$TORCH" "nvidia-ml-py>=12,<14"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM ${VARIANT}
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl
USER 10001
WORKDIR /home/minisrv
# Compiles the kernels in C for the processor of this machine, and checks the installation; on
# another processor the first start compiles them, in a second. Kernels of a GPU need the GPU: keep
# /home/minisrv/.cache on a volume, which the first start or `minisrv compile MODEL` fills.
RUN minisrv chat --device cpu --quick Hello --max-tokens 1 < /dev/null
EXPOSE 8000
# Ready is more than alive: /ready answers 503 while the engine loads, and when it has died.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
# minisrv drains for --shutdown-timeout (10 s); give `docker stop -t` more than that.
STOPSIGNAL SIGTERM
ENTRYPOINT ["minisrv"]
CMD ["serve", "--host", "0.0.0.0"]
