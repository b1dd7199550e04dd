#!/usr/bin/env bash
# Build the image `cpu` and run it, without a container engine: buildah with chroot isolation.
#
# Checks that it starts as a numeric user who cannot write to its root, serves a completion, is
# healthy by its own command (while it loads as well), drains at SIGTERM and exits with 0, and that
# a second start takes the kernels that the first one compiled from /state. Tells its size and how
# long it takes to be ready. Needs root.
# Exit: 0 done, 1 a check failed, 77 skipped, with the reason.
#
#   WORK=DIR       where images are kept (several GB, removed unless KEEP=1)
#   BASE=pull      take the base image from its registry instead of making it with debootstrap
#   TORCH_INDEX=   as in the Makefile
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*" >&2; exit 77; }
fail() { echo "FAILED: $*" >&2; [ -f "$LOG" ] && tail -n 30 "$LOG" >&2; exit 1; }

GOAL_MB=1500
READY_S=600  # compiling kernels takes some 20 s of a core, and the machine may be busy
IMAGE=localhost/infmoe:cpu
BASE_IMAGE=$(sed -n 's/^ARG PYTHON_IMAGE=//p' docker/Dockerfile)
[ "$(id -u)" = 0 ] || skip "only root can build in a chroot here"
for tool in buildah curl python3 setpriv unshare; do
  command -v "$tool" >/dev/null || skip "$tool is not installed"
done

KEEP=${KEEP:-0}
WORK=${WORK:-$(mktemp -d)}
mkdir -p "$WORK"
LOG=$WORK/serve.log
B=(buildah --root "$WORK/store" --runroot "$WORK/run" --storage-driver vfs)
server_pid= container= scratch=

clean() {
  [ -z "$server_pid" ] || kill -KILL "$server_pid" 2>/dev/null || true
  [ -z "$container" ] || "${B[@]}" rm "$container" >/dev/null 2>&1 || true
  [ -z "$scratch" ] || rm -rf "$scratch"
  [ "$KEEP" = 1 ] || rm -rf "$WORK"
}
trap clean EXIT

make_base() {  # a stand-in for the base image: the same Debian and Python, from Debian's packages
  command -v debootstrap >/dev/null || skip "debootstrap is not installed; BASE=pull pulls instead"
  local root=$WORK/base mirror id
  mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{sources,list} 2>/dev/null || true; } \
    | sed -nE 's/^(URIs:|deb) +(\[[^]]*\] +)?([a-z]+:[^ ]+).*/\3/p' | head -n 1)
  [ -n "$mirror" ] || skip "apt has no mirror"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv \
    bookworm "$root" "$mirror" >"$WORK/debootstrap.log" || fail "debootstrap: $WORK/debootstrap.log"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* \
    "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
  ln -s /usr/bin/python3 "$root/usr/local/bin/python"
  ln -s /usr/bin/pip3 "$root/usr/local/bin/pip"
  id=$("${B[@]}" from scratch)
  "${B[@]}" add -q "$id" "$root" / >/dev/null
  "${B[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$id"
  "${B[@]}" commit -q "$id" "docker.io/library/$BASE_IMAGE" >/dev/null
  "${B[@]}" rm "$id" >/dev/null
  rm -rf "$root"
}

pip_mounts() {  # what pip is set up with on this machine: its files, and the folders they name
  local file path
  for file in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    [ -f "$file" ] || continue
    echo "$file:/${file#/}:ro"
    grep -oE '(file://)?/[^ ,]+' "$file" | while read -r path; do
      case $path in
        file://*) path=$(dirname "${path#file://}") ;;  # an index; its files lie beside it
      esac
      [ -d "$path" ] && echo "$path:$path:ro"
    done || true
  done
  [ ! -d /etc/ssl/certs ] || echo "/etc/ssl/certs:/etc/ssl/certs:ro"
}

if ! "${B[@]}" inspect --type image "docker.io/library/$BASE_IMAGE" >/dev/null 2>&1; then
  if [ "${BASE:-}" = pull ]; then "${B[@]}" pull -q "docker.io/library/$BASE_IMAGE" >/dev/null
  else make_base; fi
fi

mapfile -t mounts < <(pip_mounts | sort -u | sed 's/^/-v=/')
start_s=$SECONDS
"${B[@]}" bud -q --isolation chroot --format docker --pull-never "${mounts[@]}" \
  --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" --ignorefile .dockerignore \
  -f docker/Dockerfile --target cpu -t "$IMAGE" . >"$WORK/build.log" 2>&1 \
  || { LOG=$WORK/build.log; fail "the build"; }
echo "built in $((SECONDS - start_s)) s"
"${B[@]}" rmi --prune >/dev/null 2>&1 || true

"${B[@]}" inspect --type image "$IMAGE" >"$WORK/image.json"
python3 - "$WORK/image.json" <<'PY' || fail "what the image is set to"
import json, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
assert config["User"] == "1000:1000", config["User"]
assert config["Entrypoint"] == ["infmoe"] and config["Cmd"] == ["serve"], config
assert config["Healthcheck"]["Test"] == ["CMD", "infmoe", "health"], config["Healthcheck"]
assert config["StopSignal"] == "SIGTERM" and "8000/tcp" in config["ExposedPorts"], config
assert config["Labels"]["org.opencontainers.image.title"] == "InfMoE", config["Labels"]
PY

container=$("${B[@]}" from --pull-never "$IMAGE")
root=$("${B[@]}" mount "$container")
size_mb=$(($(du -sx --block-size=1 "$root" | cut -f 1) / 1000000))
for leftover in gcc cc make git; do
  [ ! -e "$root/usr/bin/$leftover" ] || fail "the image holds $leftover"
done
[ ! -e "$root/root/.cache/pip" ] && [ ! -e "$root/opt/infmoe/bin/pip" ] || fail "the image holds pip's leavings"

# buildah passes no signals on and knows no read-only root, so the run itself is made of what
# containers are made of: a mount namespace, the image bound read-only, a tmpfs, the user, no
# capabilities, no way to new ones.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
scratch=$(mktemp -d)
chmod 755 "$scratch"
install -d -o 1000 -g 1000 "$scratch/state"  # a volume: it outlives the container
cat >"$scratch/run.sh" <<'RUN'
set -e
root=$1; state=$2; shift 2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/tmp"
mount --bind "$state" "$root/state"
mount -t tmpfs -o size=64m,uid=1000,gid=1000 tmpfs "$root/adapters"
mount -o remount,bind,ro "$root"
exec chroot "$root" /usr/bin/setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs \
  --bounding-set=-all --inh-caps=-all "$@"
RUN
mapfile -t image_env < <(python3 - "$WORK/image.json" <<'PY'
import json, sys
print(*json.load(open(sys.argv[1]))["Docker"]["config"]["Env"], sep="\n")
PY
)
in_image() {
  exec unshare --mount --propagation private env -i "${image_env[@]}" "INFMOE_PORT=$port" \
    INFMOE_HOST=127.0.0.1 INFMOE_ALLOW_UNAUTHENTICATED=true OMP_NUM_THREADS=1 \
    bash "$scratch/run.sh" "$root" "$scratch/state" "$@"
}

start() {  # serve in the background and wait until it is ready; sets server_pid and ready_s
  local begin=$SECONDS is_loading=0
  (in_image infmoe serve) >"$LOG" 2>&1 &
  server_pid=$!
  until curl -fsS "http://127.0.0.1:$port/health/ready" >/dev/null 2>&1; do
    kill -0 "$server_pid" 2>/dev/null || fail "the server ended"
    [ $((SECONDS - begin)) -lt $READY_S ] || fail "not ready after $READY_S s"
    if [ $is_loading = 0 ] && curl -sS "http://127.0.0.1:$port/health/live" >/dev/null 2>&1; then
      is_loading=1
      (in_image infmoe health >/dev/null) || fail "infmoe health while it loads"
    fi
    sleep 0.2
  done
  ready_s=$((SECONDS - begin))
}

stop() {  # at SIGTERM it must end, and well
  local status=0 begin=$SECONDS
  kill -TERM "$server_pid"
  wait "$server_pid" || status=$?
  server_pid=
  drain_s=$((SECONDS - begin))
  [ "$status" = 0 ] || fail "exit status $status after SIGTERM"
}

kernels() {  # what is kept of them, with times
  find "$scratch/state/cache" -name '*.nb[ic]' -printf '%p %s %T@\n' | sort
}

complete() {
  local reply
  reply=$(curl -fsS "http://127.0.0.1:$port/v1/completions" -H 'content-type: application/json' \
    -d '{"prompt": "And God said unto Moses,", "max_tokens": 12, "temperature": 0}')
  python3 -c 'import json, sys; t = json.loads(sys.argv[1])["choices"][0]["text"]; assert t.strip(); print(t)' \
    "$reply" || fail "the completion: $reply"
}

start
first_s=$ready_s
engine_pid=$(cat "/proc/$server_pid/task/$server_pid/children")
[ -n "$engine_pid" ] || fail "the engine has no process of its own"
for pid in $server_pid $engine_pid; do
  user=$(awk '/^Uid:/ {print $2}' "/proc/$pid/status")
  capabilities=$(awk '/^CapEff:/ {print $2}' "/proc/$pid/status")
  [ "$user" = 1000 ] || fail "it runs as user $user"
  [ "$capabilities" = 0000000000000000 ] || fail "it has capabilities: $capabilities"
done
(in_image python -c '
import os
assert os.getuid() == 1000
for path in ("/probe", "/opt/infmoe/probe", "/models/probe", "/usr/local/probe"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise SystemExit(f"{path} could be written")
for path in ("/tmp/probe", "/state/probe", "/adapters/probe"):
    open(path, "w").close()
') || fail "what can be written"
(in_image infmoe health) || fail "infmoe health"

answer=$(complete)

# A stream that is under way when the signal comes must reach its end.
stream='{"prompt": "And God said", "max_tokens": 200, "temperature": 1, "seed": 1, "ignore_eos": true, "stream": true}'
curl -fsSN "http://127.0.0.1:$port/v1/completions" -H 'content-type: application/json' -d "$stream" \
  >"$scratch/stream" &
stream_pid=$!
for _ in $(seq 100); do [ -s "$scratch/stream" ] && break; sleep 0.02; done
stop
stream_s=$drain_s
wait "$stream_pid" || fail "the stream broke off"
tail -n 3 "$scratch/stream" | grep -q '^data: \[DONE\]' || fail "the stream did not end well"
(in_image infmoe health) 2>/dev/null && fail "infmoe health says that a dead server is well"

kept=$(kernels)
[ -n "$kept" ] || fail "no kernels are kept in /state"
start
[ "$(complete)" = "$answer" ] || fail "the second start answers otherwise"
[ "$(kernels)" = "$kept" ] || fail "the second start compiled its kernels again"
stop

echo "runs as user $user without capabilities on a read-only root; completion, health, drain: ok"
echo "ready after $first_s s, with the kernels kept after $ready_s s;" \
  "ended $stream_s s after SIGTERM with a stream under way, $drain_s s without"
echo "size: $size_mb MB (goal: under $GOAL_MB MB)"
[ "$size_mb" -lt "$GOAL_MB" ] || fail "larger than the goal"
