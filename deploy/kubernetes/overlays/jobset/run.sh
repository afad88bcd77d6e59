#!/bin/sh
# A pod of the server. The server has no end of its own: a clean exit means that the pod was told to stop. JobSet would
# count that as success when a node is drained, and never start the pod again, so it becomes 143.
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
