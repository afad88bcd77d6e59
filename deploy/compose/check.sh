#!/usr/bin/env bash
# Use compose.yaml as in production: a server, a job over mutual TLS with a token, Prometheus and TensorBoard together. Kill
# the server in the middle and start it again, replace its certificate while the job trains, and check what Prometheus and
# TensorBoard recorded. deploy/image.sh runs it with the image that it built; it needs Docker and Compose.
#
#   IMAGE=maskwire:test     the image
#   PROMETHEUS_IMAGE=…      Prometheus; if it cannot be pulled, Debian's package is built into an image here
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${IMAGE:-maskwire}
work=$(mktemp -d)
project=maskwire-check-$$
export SECRETS=$work/secrets DATA=$PWD/client CLIENT_USER=10001
export PORT=${PORT:-50062} PROMETHEUS_PORT=${PROMETHEUS_PORT:-9491} TENSORBOARD_PORT=${TENSORBOARD_PORT:-6106}
say() { printf '%s\n' "$*"; }
if docker compose version >/dev/null 2>&1; then program=(docker compose); else program=(docker-compose); fi
files=(--project-directory "$PWD" --file "$work/compose.yaml" --file "$work/small.yaml")
compose() { "${program[@]}" --project-name "$project" "${files[@]}" "$@"; }
fail() { say "FAILED: $*" >&2; compose logs --tail 30 server prometheus tensorboard >&2 2>&1 || true; exit 1; }
own() { docker run --rm --user 0 --entrypoint chown --volume "$work:/mnt" "$image" -R "$1" /mnt/secrets/"$2" >/dev/null; }
clean() {
  compose --profile train --profile monitoring down --volumes --timeout 5 >/dev/null 2>&1 || true
  docker run --rm --user 0 --entrypoint chown --volume "$work:/mnt" "$image" -R "$(id -u):$(id -g)" /mnt >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean EXIT
has() { docker run --rm --entrypoint python "$image" -c "import $1" 2>/dev/null; }
wait_for() { # wait_for SECONDS WHAT COMMAND …
  local left=$1 what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    left=$((left - 1)); [ "$left" -gt 0 ] || fail "$what did not come"
    sleep 1
  done
}
get() { .venv/bin/python -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())' "$1"; }
# The value of a metric, as Prometheus has it; nothing if there is none.
metric() {
  get "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query?query=$1" | .venv/bin/python -c '
import json, sys
for each in json.load(sys.stdin)["data"]["result"]: print(float(each["value"][1]))'
}
reaches() { [ "$(metric "$1" | cut -d. -f1)" = "$2" ]; }
acknowledged() { if [ -f "$work/out/metrics.jsonl" ]; then wc -l <"$work/out/metrics.jsonl"; else echo 0; fi; }
trained() { [ "$(acknowledged)" -ge "$1" ] || ! docker inspect --format '{{.State.Running}}' "$job" | grep -q true; }
curves() { get "http://127.0.0.1:$TENSORBOARD_PORT/data/plugin/scalars/tags"; }
has_curves() { curves | grep -q loss; }
serial() { # of the certificate that the server shows, before it refuses a client that has none
  { openssl s_client -connect "127.0.0.1:$PORT" -alpn h2 </dev/null 2>/dev/null || true; } | openssl x509 -noout -serial
}

cp compose.yaml "$work/compose.yaml"
telemetry=; has maskwire_server.telemetry && telemetry=1
if [ -z "$telemetry" ]; then
  say "   this image has no telemetry: started without metrics and event files, and without what reads them"
  sed -i '/MASKWIRE_TELEMETRY__/d' "$work/compose.yaml"
fi
cat >"$work/small.yaml" <<EOF
services:
  server:
    image: $image
    environment:
      MASKWIRE_MODEL__DIM: 64
      MASKWIRE_MODEL__DEPTH: 2
      MASKWIRE_MODEL__HEADS: 2
      MASKWIRE_MODEL__MAX_SEQ_LEN: 64
      MASKWIRE_SERVE__THREADS: 1
  train:
    image: $image
    volumes:
      - $work/out:/out
  tensorboard:
    image: $image
EOF
grep -q '^version' compose.yaml || sed -i '1i version: "3.8"' "$work/small.yaml" # Compose 1 wants it in each file
[ "${program[0]}" = docker ] && sed -i 1d "$work/small.yaml"
deploy/secrets.sh "$work/secrets" server >/dev/null 2>&1
mkdir "$work/out"; chmod 777 "$work/out"; chmod 755 "$work"
own 10001:10001 server; own 10001:10001 client; chmod 755 "$work/secrets"

say "1. the server over mutual TLS, Prometheus and TensorBoard"
compose up --detach server >/dev/null 2>&1 || fail "compose up"
server=$(compose ps -q server)
wait_for 180 "the ready server" docker exec "$server" maskwire health --target unix:/tmp/maskwire.sock
if [ -n "$telemetry" ]; then
  export PROMETHEUS_IMAGE=${PROMETHEUS_IMAGE:-prom/prometheus:v3.5.0}
  if ! docker image inspect "$PROMETHEUS_IMAGE" >/dev/null 2>&1 && ! docker pull -q "$PROMETHEUS_IMAGE" >/dev/null 2>&1; then
    say "   $PROMETHEUS_IMAGE cannot be pulled: Debian's Prometheus takes its place"
    PROMETHEUS_IMAGE=maskwire-check-prometheus
    printf '%s\n' 'FROM python:3.11-slim-bookworm' \
      'RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus \' \
      ' && install -d -o nobody /prometheus' 'USER nobody' 'ENTRYPOINT ["/usr/bin/prometheus"]' \
      | docker build --network=host --quiet --tag "$PROMETHEUS_IMAGE" - >/dev/null || fail "Prometheus was not built"
  fi
  compose --profile monitoring up --detach --no-deps prometheus tensorboard >/dev/null 2>&1 || fail "compose up, monitoring"
  wait_for 60 "the first scrape" reaches 'up{job="maskwire"}' 1
fi
code=0; .venv/bin/maskwire status --target "127.0.0.1:$PORT" --ca "$work/secrets/admin/ca.crt" \
  --token-file "$work/secrets/admin/admin.token" --retry-for 2 >"$work/err" 2>&1 || code=$?
[ "$code" != 0 ] || fail "a client without a certificate was let in"
say "   a client without a certificate is refused: exit code $code"

say "2. the job trains; kill -9 of the server in the middle loses nothing"
job=$(compose run --detach train train /data --pattern '*.py' --until-step 1000 --window 4 --batch-size 4 \
  --metrics /out/metrics.jsonl --name check 2>/dev/null | tail -1)
wait_for 300 "step 100" trained 100
docker kill --signal KILL "$server" >/dev/null
say "   killed after step $(acknowledged), exit code $(docker wait "$server")"
docker start "$server" >/dev/null
at=$(acknowledged)
wait_for 300 "a step after the kill" trained $((at + 50))

say "3. a new certificate while it trains"
if has maskwire_server.rpc.credential_files; then
  docker logs "$job" >"$work/before" 2>&1
  before=$(serial) || fail "the server shows no certificate"
  own "$(id -u):$(id -g)" server
  deploy/secrets.sh --renew "$work/secrets" server >/dev/null
  own 10001:10001 server
  docker kill --signal HUP "$server" >/dev/null # without the signal it takes up to a minute
  shows_another() { now=$(serial); [ -n "$now" ] && [ "$now" != "$before" ]; }
  at=$(acknowledged)
  wait_for 90 "the new certificate" shows_another
  wait_for 300 "a step after the new certificate" trained $((at + 50))
  compose run --rm train status >"$work/err" 2>&1 || fail "a new client is refused: $(cat "$work/err")"
  [ "$at" -lt 950 ] || fail "the job had ended before the certificate was replaced"
  docker logs "$job" >"$work/after" 2>&1
  [ "$(grep -c waiting "$work/before" || true)" = "$(grep -c waiting "$work/after" || true)" ] || fail "a step had to wait"
  say "   $before became $(serial), and no step failed or waited"
else
  say "   skipped: this image reads certificates only at the start"
fi

code=$(docker wait "$job")
docker logs "$job" >"$work/job.log" 2>&1
[ "$code" = 0 ] || fail "the job ended with exit code $code: $(tail -5 "$work/job.log")"
steps=$(grep -o '"step": [0-9]*' "$work/out/metrics.jsonl" | sort -u | wc -l)
[ "$steps" = 1000 ] || fail "$steps steps were acknowledged, not 1000"
say "   $(grep digest "$work/job.log" | tail -1)"

if [ -n "$telemetry" ]; then
  say "4. Prometheus and TensorBoard have seen it"
  wait_for 60 "step 1000 in the scrape" reaches 'maskwire_step' 1000
  restarts=$(metric 'changes(process_start_time_seconds{job="maskwire"}[30m])')
  case $restarts in 1.0) ;; *) fail "Prometheus saw ${restarts:-no} restarts, not 1" ;; esac
  say "   maskwire_step 1000, one restart, $(metric 'maskwire_loss{kind="total"}' | head -1) nats"
  wait_for 60 "TensorBoard's curves" has_curves
  say "   TensorBoard has curves: $(curves | head -c 200)"
fi
compose stop --timeout 60 server >/dev/null 2>&1
code=$(docker inspect --format '{{.State.ExitCode}}' "$server")
[ "$code" = 0 ] || fail "exit code $code of the server on SIGTERM, not 0"
say "the compose file does what it should"
