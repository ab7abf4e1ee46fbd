#!/usr/bin/env bash
# Runs a command with a container engine: tests/images/with_engine.sh COMMAND ...
#
# An engine that answers already is used as it is. Otherwise one is started in a folder in memory and taken down at the end, which
# needs root and two capabilities; without these the command runs with no engine, and MLENV_NO_ENGINE says why. With
# MLENV_REQUIRE_ENGINE=1 that is a failure.
set -euo pipefail

folder=""
process=""

has_capability() { # bit of CapEff
  (((0x$(sed -n 's/^CapEff:\t*//p' /proc/self/status) >> $1) & 1))
}

installed() {
  command -v dockerd >/dev/null && [ -x /usr/bin/docker ] && [ -x /bin/busybox ] && command -v docker-registry >/dev/null
}

install() {
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io docker-registry busybox-static
} >/dev/null 2>&1

start() { # storage driver. Without rules of its own the engine leaves the machine's networks alone.
  rm -f "$folder/docker.pid"
  setsid dockerd --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/docker.pid" \
    --host "unix://$folder/docker.sock" --storage-driver "$1" \
    --iptables=false --ip-forward=false --ip-masq=false >"$folder/dockerd.log" 2>&1 </dev/null &
  process=$!
  for _ in $(seq 150); do
    if /usr/bin/docker version >/dev/null 2>&1; then return 0; fi
    if ! kill -0 "$process" 2>/dev/null; then return 1; fi
    sleep 0.2
  done
  return 1
}

stop() {
  if [ -n "$process" ]; then kill "$process" 2>/dev/null && wait "$process" || true; fi
  process=""
}

works() { # A daemon that answers is not enough: a container must be built and run.
  mkdir -p "$folder/busybox"
  cp /bin/busybox "$folder/busybox"
  printf 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\nENV PATH=/bin\n' >"$folder/busybox/Dockerfile"
  DOCKER_BUILDKIT=1 /usr/bin/docker build -q -t mlenv-test/busybox:1 "$folder/busybox" >/dev/null &&
    [ "$(/usr/bin/docker run --rm --network none mlenv-test/busybox:1 echo works)" = works ]
}

down() {
  stop
  [ -n "$folder" ] || return 0
  ip link delete docker0 2>/dev/null || true
  grep -F " $folder/" /proc/mounts | awk '{print $2}' | sort -r | xargs -r umount || true
  if mountpoint -q "$folder"; then umount "$folder"; fi
  rm -rf "$folder"
}

up() { # Prints why not.
  if [ "$(id -u)" != 0 ]; then echo "not root"; return 1; fi
  if ! has_capability 21 || ! has_capability 12; then echo "no CAP_SYS_ADMIN or no CAP_NET_ADMIN"; return 1; fi
  if ! installed && ! install; then echo "docker.io cannot be installed"; return 1; fi
}

no_engine() {
  echo "ENGINE: none ($1)" >&2
  if [ "${MLENV_REQUIRE_ENGINE:-}" = 1 ]; then exit 1; fi
  export MLENV_NO_ENGINE=$1
}

if ! { [ -x /usr/bin/docker ] && /usr/bin/docker version; } >/dev/null 2>&1; then
  if reason=$(up); then
    folder=$(mktemp -d /tmp/mlenv-engine.XXXXXX)
    trap down EXIT
    mount -t tmpfs -o size=8g,mode=755 mlenv-engine "$folder" || true
    export DOCKER_HOST=unix://$folder/docker.sock MLENV_ENGINE_FOLDER=$folder
    if ! { start overlay2 && works; }; then
      stop
      if ! { start vfs && works; }; then # It is known to work with these capabilities: no reason to skip.
        tail -n 20 "$folder/dockerd.log" >&2
        echo "ENGINE: one started and runs no container" >&2
        exit 1
      fi
    fi
  else
    no_engine "$reason"
  fi
fi
"$@"
