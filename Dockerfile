# maskwire-server, and the client beside it. Two stages: the second has no pip cache, no compiler and no sources.
#
#   docker build -t maskwire .                                               torch with CUDA
#   docker build -t maskwire --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     a CPU build
#   docker build -t maskwire --build-arg EXTRAS=storage,telemetry,huggingface,x-transformers .     other models than the encoder
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build

# Where torch comes from; empty: the usual index.
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/maskwire
ENV PATH=/opt/maskwire/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt .
# torch by itself: a layer that a change of the sources leaves as it is.
RUN if [ -n "$TORCH_INDEX" ]; then pip install -c constraints.txt --index-url "$TORCH_INDEX" torch; \
    else pip install -c constraints.txt torch; fi
ARG EXTRAS=server,storage,telemetry
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN pip install -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="maskwire" \
      org.opencontainers.image.description="Train masked-token models on a machine that is not your laptop" \
      org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 10001 maskwire \
    && useradd --uid 10001 --gid maskwire --no-create-home --home-dir /run-dir --shell /usr/sbin/nologin maskwire \
    && install -d -o maskwire -g maskwire -m 0700 /run-dir
COPY --from=build /opt/maskwire /opt/maskwire
ENV PATH=/opt/maskwire/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MASKWIRE_RUN__DIR=/run-dir/run \
    MASKWIRE_SERVE__ADDRESS=0.0.0.0:50051 \
    MASKWIRE_SERVE__SOCKET=/tmp/maskwire.sock
USER maskwire
VOLUME /run-dir
EXPOSE 50051
STOPSIGNAL SIGTERM
# Through the Unix socket: it needs no certificate and no token, whatever the address asks for. Liveness, not
# readiness: a long recovery is work, and must not be cut off by whoever replaces unhealthy containers.
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=3 \
    CMD ["maskwire", "health", "--target", "unix:/tmp/maskwire.sock", "--service", "liveness"]
ENTRYPOINT ["maskwire-server"]
CMD ["serve"]
