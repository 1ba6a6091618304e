# The sidecar as an image. Nothing here depends on the architecture (every dependency has wheels for amd64 and
# arm64); only amd64 is built by the tests. Both base images must have the same Python at the same path.
ARG BUILD_IMAGE=python:3.11.11-slim-bookworm
ARG RUNTIME_IMAGE=python:3.11.11-slim-bookworm

FROM ${BUILD_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# Two environments: /opt/build has pip and hatchling and stays behind, /opt/eventwatch has neither.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/eventwatch
# The dependencies are a layer of their own, which a change of the sources does not build again. `.ci/lock` renews them.
COPY .ci/requirements.txt .ci/build-requirements.txt ./
RUN /opt/build/bin/pip install --only-binary :all: --require-hashes -r build-requirements.txt \
    && /opt/build/bin/pip --python /opt/eventwatch/bin/python install --no-compile --only-binary :all: \
        --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY eventwatch eventwatch
# Compiled here, once: the root file system is read-only later. By hash, so that no time stamp gets in.
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/build/bin/pip --python /opt/eventwatch/bin/python install --no-compile --no-deps dist/*.whl \
    && /opt/build/bin/pip --python /opt/eventwatch/bin/python check \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/eventwatch/lib

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="eventwatch" \
    org.opencontainers.image.description="Keeps ToolServer node documents in MongoDB true to their Docker containers" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}"
# Nothing is installed in a running sidecar: the base image's installers are of use to an intruder only.
RUN rm -rf /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/* /usr/local/bin/pip*
COPY --from=build /opt/eventwatch /opt/eventwatch
ENV PATH=/opt/eventwatch/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number, which Kubernetes' runAsNonRoot can check; the socket's group is added at run time.
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 CMD ["eventwatch", "healthcheck"]
ENTRYPOINT ["eventwatch"]
CMD ["run"]
