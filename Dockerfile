# rlft on a machine with NVIDIA GPUs:
#   docker build -t rlft . && docker run --gpus all --ipc=host -v "$PWD:/work" rlft train run.toml
# The development image, since Triton compiles launchers with a C compiler and vLLM's kernels may need nvcc.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --no-install-recommends -y python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/rlft
ENV PATH=/opt/rlft/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/work/.cache/huggingface

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rlft rlft
RUN pip install --no-cache-dir '.[vllm,wandb,tasks]'

WORKDIR /work
ENTRYPOINT ["rlft"]
CMD ["--help"]
