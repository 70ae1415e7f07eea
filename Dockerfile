# The environment of requirements.txt, with the project in it.
#
#   docker build --tag vader .
#   docker run --rm --gpus all --volume "$PWD/runs:/vader/runs" --volume vader-cache:/cache vader \
#       vader train vader_train
#
# The wheels of torch bring CUDA; the host brings the driver and NVIDIA's container toolkit. Without --gpus, everything
# runs on the CPU.
FROM python:3.11.13-slim-bookworm

# compile_blocks compiles kernels.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /vader
COPY . .
RUN sh scripts/setup.sh && rm -rf /root/.cache

# /cache keeps downloaded weights between containers.
ENV HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/vader/.venv/bin:$PATH

VOLUME ["/cache", "/vader/runs"]
CMD ["vader", "quickstart"]
