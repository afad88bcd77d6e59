#!/usr/bin/env bash
# Build the image and use it as in production: read-only, no capabilities, TLS and a token; train from outside,
# kill it in the middle, start it again, resume, stop it cleanly; then the services of compose.yaml together
# (deploy/compose/check.sh). `make image` runs it; it needs a Docker daemon, and Compose for the second part.
#
#   IMAGE=maskwire:test     the tag           BUILD_OPTIONS="--build-arg TORCH_INDEX=…"     more for docker build
set -euo pipefail
cd "$(dirname "$0")/.."
image=${IMAGE:-maskwire}
maskwire=.venv/bin/maskwire
port=${PORT:-50061}
name=maskwire-image-check-$$
work=$(mktemp -d)
say() { printf '%s\n' "$*"; }
fail() { say "FAILED: $*" >&2; docker logs "$name" 2>&1 | tail -20 >&2 || true; exit 1; }
job=
own() { docker run --rm --user 0 --entrypoint chown --volume "$work/secrets/server:/secrets" "$image" -R "$1" /secrets >/dev/null; }
clean() { own "$(id -u):$(id -g)" 2>/dev/null || true; [ -z "$job" ] || kill "$job" 2>/dev/null || true; docker rm -fv "$name" >/dev/null 2>&1 || true; docker volume rm "$name" >/dev/null 2>&1 || true; rm -rf "$work"; }
trap clean EXIT
docker version >/dev/null 2>&1 || { say "no Docker daemon answers; start one, or set DOCKER_HOST" >&2; exit 1; }

say "1. build"
# shellcheck disable=SC2086
docker build ${BUILD_OPTIONS:-} --tag "$image" . >"$work/build.log" 2>&1 || { tail -30 "$work/build.log" >&2; exit 1; }
say "   $(docker image inspect --format '{{.Size}}' "$image" | awk '{printf "%.2f GB", $1 / 1e9}')"

say "2. without certificates it does not listen beyond loopback"
code=0; docker run --rm "$image" >"$work/refused" 2>&1 || code=$?
[ "$code" = 2 ] || fail "exit code $code, not 2: $(cat "$work/refused")"
say "   $(tail -1 "$work/refused")"

say "3. run: read-only, no capabilities, no new privileges, TLS, tokens"
deploy/secrets.sh "$work/secrets" >/dev/null 2>&1
own 10001:10001  # keys and tokens have mode 0600; as root, secrets.sh has done it already
run() {
  docker run --detach --name "$name" --read-only --cap-drop=ALL --security-opt=no-new-privileges --tmpfs /tmp \
    --publish "127.0.0.1:$port:50051" --volume "$name:/run-dir" --volume "$work/secrets/server:/secrets:ro" \
    --env MASKWIRE_SERVE__TLS_CERTIFICATE=/secrets/server.crt --env MASKWIRE_SERVE__TLS_KEY=/secrets/server.key \
    --env MASKWIRE_SERVE__TOKEN_TRAIN_FILE=/secrets/train.token \
    --env MASKWIRE_SERVE__TOKEN_ADMIN_FILE=/secrets/admin.token \
    --env MASKWIRE_MODEL__DIM=64 --env MASKWIRE_MODEL__DEPTH=2 --env MASKWIRE_MODEL__HEADS=2 \
    --env MASKWIRE_MODEL__MAX_SEQ_LEN=64 --env MASKWIRE_SERVE__THREADS=1 "$image" >/dev/null
}
ready() {
  for _ in $(seq 120); do
    docker exec "$name" maskwire health --target unix:/tmp/maskwire.sock >/dev/null 2>&1 &&
      [ "$(docker inspect --format '{{.State.Health.Status}}' "$name")" = healthy ] && return
    [ "$(docker inspect --format '{{.State.Running}}' "$name")" = true ] || fail "the container ended"
    sleep 1
  done
  fail "it did not become healthy and ready"
}
run; ready
say "   healthy and ready, as $(docker exec "$name" sh -c 'echo "uid $(id -u)"'), $(docker inspect --format '{{.HostConfig.ReadonlyRootfs}}' "$name" | sed 's/true/root file system read-only/')"

say "4. refused: no token; another authority"
common=(--target "127.0.0.1:$port" --retry-for 300)
code=0; "$maskwire" status "${common[@]}" --ca "$work/secrets/client/ca.crt" 2>"$work/err" || code=$?
[ "$code" = 6 ] || fail "without a token: exit code $code, not 6: $(cat "$work/err")"
say "   $(cat "$work/err")"
deploy/secrets.sh "$work/other" >/dev/null 2>&1
code=0; "$maskwire" status "${common[@]}" --ca "$work/other/client/ca.crt" 2>"$work/err" || code=$?
[ "$code" = 6 ] || fail "another authority: exit code $code, not 6: $(cat "$work/err")"
say "   $(head -c 160 "$work/err") …"

say "5. train from outside, kill -9 in the middle, start again: the same job resumes"
common+=(--ca "$work/secrets/client/ca.crt" --token-file "$work/secrets/client/train.token")
"$maskwire" train client --pattern '*.py' --until-step 400 --window 4 --length 64 --batch-size 16 "${common[@]}" \
  --metrics "$work/metrics.jsonl" >"$work/train.out" 2>"$work/train.err" &
job=$!
for _ in $(seq 600); do
  [ -f "$work/metrics.jsonl" ] && [ "$(wc -l <"$work/metrics.jsonl")" -ge 100 ] && break
  kill -0 "$job" 2>/dev/null || fail "training ended early: $(cat "$work/train.err")"
  sleep 0.1
done
docker kill --signal KILL "$name" >/dev/null
say "   killed after step $(tail -1 "$work/metrics.jsonl" | grep -o '"step": [0-9]*' | tr -dc 0-9), exit code $(docker wait "$name")"
docker start "$name" >/dev/null
wait "$job" || fail "the job did not resume: $(cat "$work/train.err")"
job=
say "   $(tail -1 "$work/train.out")"
steps=$(grep -o '"step": [0-9]*' "$work/metrics.jsonl" | sort -u | wc -l)
[ "$steps" = 400 ] || fail "$steps steps were acknowledged, not 400"

say "6. weights out: the training token may not, the admin's may"
code=0; "$maskwire" checkpoint download "${common[@]}" --out "$work/denied" 2>"$work/err" || code=$?
[ "$code" = 6 ] || fail "download with the train token: exit code $code, not 6"
say "   $(cat "$work/err")"
"$maskwire" checkpoint download --weights --out "$work/weights" --target "127.0.0.1:$port" \
  --ca "$work/secrets/admin/ca.crt" --token-file "$work/secrets/admin/admin.token" | sed 's/^/   /'

say "7. SIGTERM"
docker stop --time 60 "$name" >/dev/null
code=$(docker inspect --format '{{.State.ExitCode}}' "$name")
[ "$code" = 0 ] || fail "exit code $code on SIGTERM, not 0"
say "   exit code 0"
say "8. the services of compose.yaml"
if docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; then
  IMAGE=$image PORT=$((port + 1)) deploy/compose/check.sh
else
  say "   skipped: Docker Compose is not installed"
fi
say "the image does what it should"
