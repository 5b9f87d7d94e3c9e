# Holdfast for a machine with an NVIDIA GPU and the NVIDIA Container Toolkit:
#   docker build -t holdfast .
#   docker run --rm --gpus all -v "$PWD":/work holdfast run first.yaml
FROM python:3.11-slim
RUN useradd --create-home --uid 1000 holdfast && mkdir /work && chown holdfast /work
WORKDIR /opt/holdfast
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
# The torch of the package index for Linux contains CUDA.
RUN pip install --no-cache-dir -c constraints.txt ".[trl,quantization,openai]"
USER holdfast
WORKDIR /work
ENTRYPOINT ["holdfast"]
CMD ["--help"]
