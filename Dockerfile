# Build:  docker build -t detr .
# Train:  docker run --gpus all --shm-size=8g -v /data/coco:/data -v $PWD/runs:/app/runs detr train.py data=coco data.root=/data
# Loader processes pass images through shared memory: without --shm-size (or --ipc=host) they die with a bus error.
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 detr \
    && install -d -o detr -g detr /app /app/runs
USER detr
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1

# Dependencies come first, so that a change of the code does not install them again.
COPY --chown=detr pyproject.toml setup.py README.md ./
COPY --chown=detr detr/__init__.py detr/version.py detr/
RUN python3 -m venv .venv && pip install --no-cache-dir -e .
COPY --chown=detr . .

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
