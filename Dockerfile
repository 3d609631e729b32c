# The quick start in a container: docker build -t assay . && docker run --rm assay
# Not built by the tests. The pinned torch brings CUDA libraries (several GB).
FROM python:3.12-slim
WORKDIR /assay
COPY *.txt ./
COPY scripts/venv.sh scripts/
# The install of scripts/quickstart.sh, kept as a layer of its own.
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN source scripts/venv.sh && \
    make_venv run requirements.txt
COPY . .
ENV PATH=/assay/.venv/bin:$PATH
CMD ["bash", "scripts/quickstart.sh"]
