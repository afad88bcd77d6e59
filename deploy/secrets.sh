#!/usr/bin/env bash
# Certificates and tokens for one server: an authority of its own, the server's certificate, a token of each role.
#
#   deploy/secrets.sh FOLDER [NAME ...]     names and addresses that clients call the server by; localhost is there
#
#   FOLDER/server/   ca.crt server.crt server.key read.token train.token admin.token     mount it as /secrets
#   FOLDER/client/   ca.crt read.token train.token                                       for those who train
#   FOLDER/admin/    ca.crt admin.token                                                  for restore and download
#   FOLDER/ca.key    signs further certificates; keep it off the server
#
# Keys and tokens have mode 0600 from their first byte. The image's server runs as user 10001: run as root (sudo), this
# script gives FOLDER/server to it, and the rest to the user who called sudo. Otherwise it says what is left to do.
# CONTAINER_UID names another user; CONTAINER_UID=$(id -u) where the server runs without the image.
set -euo pipefail
umask 077
folder=${1:?"usage: deploy/secrets.sh FOLDER [NAME ...]"}; shift
case $folder in */) folder=${folder%"${folder##*[!/]}"} ;; esac  # a trailing slash, as completion gives it
if [ -e "$folder" ]; then echo "$folder exists; name another folder, or remove it" >&2; exit 1; fi
command -v openssl >/dev/null || { echo "openssl is needed: apt install openssl" >&2; exit 1; }

names="DNS:localhost,IP:127.0.0.1,IP:::1"
for name in "$@"; do
  case $name in *:*) kind=IP ;; *[!0-9.]*) kind=DNS ;; *) kind=IP ;; esac
  names="$names,$kind:$name"
done

final=$folder; folder=$final.draft-$$
trap 'rm -rf "$folder"' EXIT
quietly() { "$@" 2>"$folder/log" || { cat "$folder/log" >&2; exit 1; }; }  # openssl chats where all is well
mkdir -p "$folder"
mkdir "$folder/server" "$folder/client" "$folder/admin"
curve=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
quietly openssl req -x509 "${curve[@]}" -keyout "$folder/ca.key" -out "$folder/client/ca.crt" -days 3650 \
  -subj "/CN=maskwire authority"
quietly openssl req "${curve[@]}" -keyout "$folder/server/server.key" -out "$folder/request" -subj "/CN=maskwire"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" >"$folder/names"
quietly openssl x509 -req -in "$folder/request" -CA "$folder/client/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial \
  -days 397 -extfile "$folder/names" -out "$folder/server/server.crt"
for role in read train admin; do openssl rand -hex 32 >"$folder/server/$role.token"; done
rm -f "$folder/log" "$folder/request" "$folder/names" "$folder"/*.srl "$folder"/client/*.srl
cp "$folder"/client/ca.crt "$folder/server/"
cp "$folder"/client/ca.crt "$folder/server/admin.token" "$folder/admin/"
cp "$folder"/server/read.token "$folder/server/train.token" "$folder/client/"
chmod 644 "$folder"/*/*.crt  # these are public
uid=${CONTAINER_UID:-10001}
if [ "$(id -u)" = 0 ]; then
  chown -R "${SUDO_UID:-0}:${SUDO_GID:-0}" "$folder"; chown -R "$uid:$uid" "$folder/server"
fi
mv "$folder" "$final"
echo "$final: certificate for $names, valid for 397 days; the authority for 10 years"
if [ "$(id -u)" != 0 ] && [ "$(id -u)" != "$uid" ]; then
  path=$(cd "$final/server" && pwd)
  echo "$final/server belongs to user $(id -u); the image's server, user $uid, cannot read it yet. Give it the folder:" >&2
  echo "  sudo chown -R $uid:$uid '$path'" >&2
  echo "  or without sudo: docker run --rm --user 0 --entrypoint chown -v '$path':/secrets maskwire -R $uid:$uid /secrets" >&2
fi
