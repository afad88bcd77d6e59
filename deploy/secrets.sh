#!/usr/bin/env bash
# Certificates and tokens for one server: its own certificate authority, the server's certificate, one for clients, and a
# token for each role.
#
#   deploy/secrets.sh FOLDER [NAME ...]     names and addresses that clients use for the server, besides localhost
#   deploy/secrets.sh --renew FOLDER [NAME ...]     a new key and certificate of the server, from the same authority
#
#   FOLDER/server/   ca.crt server.crt server.key read.token train.token admin.token     mount it as /secrets
#   FOLDER/client/   ca.crt client.crt client.key read.token train.token                 for those who train
#   FOLDER/admin/    ca.crt client.crt client.key admin.token                            for restore and download
#   FOLDER/ca.key    signs further certificates; keep it off the server
#
# client.crt is needed where the server asks for it (serve.tls_client_ca).
# Keys and tokens have mode 0600 from their first byte. The image's server runs as user 10001: run as root (sudo), this
# script gives FOLDER/server to that user, and the rest to the user who called sudo. Otherwise it says what is left to do.
# CONTAINER_UID names another user; CONTAINER_UID=$(id -u) where the server runs without the image.
set -euo pipefail
umask 077
renew=; [ "${1:-}" != --renew ] || { renew=1; shift; }
folder=${1:?"usage: deploy/secrets.sh [--renew] FOLDER [NAME ...]"}; shift
case $folder in */) folder=${folder%"${folder##*[!/]}"} ;; esac  # a trailing slash, as the shell completes it
if [ -n "$renew" ]; then
  [ -f "$folder/ca.key" ] || { echo "$folder has no ca.key; name the folder that this script made" >&2; exit 1; }
elif [ -e "$folder" ]; then echo "$folder exists; choose another folder, or remove it" >&2; exit 1; fi
command -v openssl >/dev/null || { echo "openssl is needed: apt install openssl" >&2; exit 1; }

names="DNS:localhost,IP:127.0.0.1,IP:::1"
for name in "$@"; do
  case $name in *:*) kind=IP ;; *[!0-9.]*) kind=DNS ;; *) kind=IP ;; esac
  names="$names,$kind:$name"
done

final=$folder; folder=$final.draft-$$
trap 'rm -rf "$folder"' EXIT
quietly() { "$@" 2>"$folder/log" || { cat "$folder/log" >&2; exit 1; }; }  # openssl writes to stderr on success too
curve=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
issue() {  # issue CERTIFICATE KEY NAME EXTENSIONS CA CA_KEY
  quietly openssl req "${curve[@]}" -keyout "$2" -out "$folder/request" -subj "/CN=$3"
  printf '%s\n' "$4" >"$folder/extensions"
  quietly openssl x509 -req -in "$folder/request" -CA "$5" -CAkey "$6" -set_serial "0x$(openssl rand -hex 15)" \
    -days 397 -extfile "$folder/extensions" -out "$1"
  rm -f "$folder/request" "$folder/extensions"
  chmod 644 "$1"  # it is public
}
server_extensions=$(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth' "$names")
uid=${CONTAINER_UID:-10001}
mkdir -p "$folder"
if [ -n "$renew" ]; then
  issue "$folder/server.crt" "$folder/server.key" maskwire "$server_extensions" "$final/client/ca.crt" "$final/ca.key"
  owner=$(stat -c %u:%g "$final/server/server.key")
  [ "$(id -u)" != 0 ] || chown "$owner" "$folder/server.crt" "$folder/server.key"
  # Not atomic: a server that reads them between the two renames sees that they do not match, and reads them again.
  mv "$folder/server.key" "$folder/server.crt" "$final/server/"
  echo "$final/server: a new certificate for $names, valid for 397 days"
  exit
fi
mkdir "$folder/server" "$folder/client" "$folder/admin"
quietly openssl req -x509 "${curve[@]}" -keyout "$folder/ca.key" -out "$folder/client/ca.crt" -days 3650 \
  -subj "/CN=maskwire authority"
issue "$folder/server/server.crt" "$folder/server/server.key" maskwire "$server_extensions" \
  "$folder/client/ca.crt" "$folder/ca.key"
for role in client admin; do
  issue "$folder/$role/client.crt" "$folder/$role/client.key" "maskwire $role" extendedKeyUsage=clientAuth \
    "$folder/client/ca.crt" "$folder/ca.key"
done
for role in read train admin; do openssl rand -hex 32 >"$folder/server/$role.token"; done
rm -f "$folder/log"
cp "$folder"/client/ca.crt "$folder/server/"
cp "$folder"/client/ca.crt "$folder/server/admin.token" "$folder/admin/"
cp "$folder"/server/read.token "$folder/server/train.token" "$folder/client/"
chmod 644 "$folder"/*/ca.crt
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
