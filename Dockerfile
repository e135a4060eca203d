# The image of the definition server; docs/containers.md describes how to build, run and replace it, with reasons.
#   docker build -t definition-server .
ARG BASE_IMAGE=python:3.12-slim
# The image in which the wheel is built, with the same Python as BASE_IMAGE. If it has no C compiler, one is installed
# from Debian.
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS wheel
# pip's own variables, for builds with another package index: --build-arg PIP_INDEX_URL. The image does not keep them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_DEFAULT_TIMEOUT
ARG PIP_RETRIES
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
# The tools of the build, in layers that are reused until they change.
COPY pyproject.toml constraints.txt deploy/image/compiler.sh ./
RUN python3 -m venv --without-pip /opt/tools \
 && python3 -m pip --python /opt/tools/bin/python install -q --no-compile --only-binary=:all: -c constraints.txt \
        $(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
# 1: the engine is compiled if possible, and otherwise pure, and a line says why; required: the build fails if it cannot
# be compiled; 0: pure.
ARG COMPILED_ENGINE=1
RUN sh compiler.sh
COPY README.md LICENSE hatch_build.py ./
COPY service service
RUN /opt/tools/bin/python -m hatchling build -t wheel -d /wheel

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_DEFAULT_TIMEOUT
ARG PIP_RETRIES
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
# An environment without pip: the base image's pip fills it from outside, and the server cannot install anything.
RUN python3 -m venv --without-pip /opt/venv
# Only the dependencies, in a layer that is reused until they change. Wheels only, because there is no compiler here.
COPY pyproject.toml constraints.txt ./
# EXTRAS=otel adds the export to OpenTelemetry.
ARG EXTRAS=
RUN python3 -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = (project["optional-dependencies"][name] for name in sys.argv[1:]); \
        print(*project["dependencies"], *sum(extras, []), sep="\n")' ${EXTRAS} > requirements.txt \
 && python3 -m pip --python /opt/venv/bin/python install -q --no-compile --only-binary=:all: \
        -r requirements.txt -c constraints.txt
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/venv/bin/python install -q --no-compile --no-deps --no-index /wheel/*.whl
COPY deploy/image/precompile.py ./
RUN PYTHONPYCACHEPREFIX=/opt/bytecode /opt/venv/bin/python precompile.py

FROM ${BASE_IMAGE}
# An account without a password, a shell or a home directory. Kubernetes checks the numbers (runAsNonRoot). Any other
# account of group 0 does as well: OpenShift runs a container with an arbitrary uid and gid 0.
RUN printf 'avap:x:10001:10001::/nonexistent:/sbin/nologin\n' >> /etc/passwd \
 && printf 'avap:x:10001:\n' >> /etc/group \
 && mkdir -p /var/lib/definition-server \
 && chown 10001:0 /var/lib/definition-server \
 && chmod 2770 /var/lib/definition-server
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/bytecode /opt/bytecode
# Bytecode comes from one read-only tree; modules come from their installation, not from the directory in which a
# process is started.
ENV PATH=/opt/venv/bin:${PATH} PYTHONPYCACHEPREFIX=/opt/bytecode PYTHONSAFEPATH=1
USER 10001:0
WORKDIR /
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
# Without a shell: this process is PID 1, and handles SIGTERM itself. No HEALTHCHECK: gRPC health and /readyz are probed
# from outside, and a HEALTHCHECK would start a Python interpreter every few seconds.
ENTRYPOINT ["/opt/venv/bin/python", "-m", "definition_server"]
CMD ["serve"]
# Last, because they change with every build.
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="AVAP Definition Server" \
      org.opencontainers.image.description="Serves the AVAP command definitions of a PostgreSQL table over gRPC, from memory" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
