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
# FOLDER itself is closed to other users; its subfolders are not, so that a container's user can read them.
set -euo pipefail
folder=${1:?"usage: deploy/secrets.sh FOLDER [NAME ...]"}; shift
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
(umask 077 && mkdir -p "$folder")
mkdir -m 755 "$folder/server" "$folder/client" "$folder/admin"
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
chmod 600 "$folder/ca.key"; chmod 644 "$folder"/*/*
mv "$folder" "$final"
echo "$final: certificate for $names, valid for 397 days; the authority for 10 years"
