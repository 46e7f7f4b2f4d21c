# The image the launch scripts name. EXTRA chooses the accelerator: none (CPU), cuda or tpu.
#
#   docker build --build-arg EXTRA=cuda -t v3jax:cuda .
#   docker run --gpus=all -v $PWD/runs:/runs v3jax:cuda --exp=v3_small --workdir=/runs/v3_small

FROM python:3.12-slim

ARG EXTRA=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 V3JAX_CACHE=/cache

WORKDIR /opt/v3jax
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY v3jax v3jax
COPY experiments experiments
COPY launch launch
RUN pip install -c constraints.txt ".${EXTRA:+[$EXTRA]}" && mkdir -p /cache /runs
VOLUME ["/cache", "/runs"]
WORKDIR /runs

ENTRYPOINT ["python", "-m", "v3jax.train"]
