#!/usr/bin/env bash
# Make the secrets that compose.yaml mounts, each a file with a random value; what is there stays.
# The folder is this user's alone; the files in it must be readable by the containers' own users.
set -euo pipefail
folder=${1:-$(dirname "${BASH_SOURCE[0]}")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
keep() {
    [ -s "$folder/$1" ] && return
    printf '%s' "$2" >"$folder/$1"
    chmod 644 "$folder/$1"
    echo "made $folder/$1"
}
keep prefect_auth "operator:$(random 24)" # user:password, what the UI asks for
keep database_password "$(random 24)"
keep store_key_id "segpipe-$(random 4)"
keep store_key "$(random 24)"
keep worker_key_id "worker-$(random 4)" # the store's user that workers are, see buckets.sh
keep worker_key "$(random 20)"
