#!/bin/sh
# A pod of the server. The server never ends by itself: exit code 0 means that the pod was told to stop. When a node is
# drained, JobSet would count 0 as success and never start the pod again, so this script exits with 143 instead.
server='' signal=''
trap 'signal=1; [ -z "$server" ] || kill -TERM "$server"' TERM INT
# The name of the leader's pod is not known before that pod has an address.
until getent hosts "$RENDEZVOUS_HOST" >/dev/null; do
  [ -z "$signal" ] || exit 143
  sleep 1
done
maskwire-server "$@" &
server=$!
[ -z "$signal" ] || kill -TERM "$server"
signal=1
while [ -n "$signal" ]; do # a signal interrupts the wait
  signal=''
  wait "$server"
  code=$?
done
[ "$code" -ne 0 ] || code=143
exit "$code"
