# server: written by mlenv from the declaration of the image. Change that, not this.
ARG BASE=python:3.11-slim

FROM ${BASE} AS system

FROM system AS tools
RUN python3.11 -m venv --without-pip /opt/venv
ENV PIP_CONFIG_FILE=/run/secrets/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_DEPS=1 PIP_ONLY_BINARY=:all:

# Exact versions, as they stand; wheels alone, so that no code of a package runs where the secrets are.
FROM tools AS packages
COPY packages.txt /packages.txt
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca --mount=type=secret,id=netrc,target=/root/.netrc \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -f /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python3.11 -m pip --python /opt/venv/bin/python install --no-compile -r /packages.txt

# mlenv after its packages and by itself: a new one changes a small layer.
FROM packages AS mlenv
RUN --mount=type=bind,source=mlenv,target=/mlenv \
    python3.11 -m pip --python /opt/venv/bin/python install --no-compile --no-warn-script-location --no-index --root /mlenv-root /mlenv/mlenv-1.0-py3-none-any.whl
# Then its bill of materials, and bytecode of what is imported at every start: that of all packages would be a fifth of the image.
RUN cp -a /mlenv-root/opt/venv/. /opt/venv/ \
    && /opt/venv/bin/python -m mlenv.images.sbom > /mlenv-root/opt/venv/sbom.json \
    && PYTHONPYCACHEPREFIX=/mlenv-root/opt/pycache /opt/venv/bin/python -m mlenv.images.first_imports

FROM system
ENV PATH=/opt/venv/bin:$PATH PYTHONPYCACHEPREFIX=/opt/pycache PYTHONUNBUFFERED=1 HOME=/tmp USER=mlenv LOGNAME=mlenv
ENV PRICE="5 \$ \"net\""
LABEL org.example.team="ads"
COPY --from=packages /opt/venv /opt/venv
COPY --from=mlenv /mlenv-root/opt /opt
WORKDIR /app
COPY files /app
USER 10001:10001
ENTRYPOINT ["mlenv", "serve"]
