#!/bin/sh
# Make the buckets of compose.yaml's store and the user that workers are; may be run again. POSIX sh: the
# store's image has no bash. Secrets are files, and reach `mc` by environment and standard input.
#   SEGPIPE_STORE      host:port of the store
#   SEGPIPE_SECRETS    folder of the secrets (/run/secrets)
set -eu
secrets=${SEGPIPE_SECRETS:-/run/secrets}
here=$(dirname "$0")

MC_HOST_store="http://$(cat "$secrets/store_key_id"):$(cat "$secrets/store_key")@$SEGPIPE_STORE"
export MC_HOST_store
mc mb --ignore-existing store/lake store/runs
mc admin policy create store segpipe-worker "$here/worker-policy.json"
printf '%s\n%s\n' "$(cat "$secrets/worker_key_id")" "$(cat "$secrets/worker_key")" | mc admin user add store
# Attaching anew what is attached is an error of `mc`: what counts is that it is attached in the end.
mc admin policy attach store segpipe-worker --user "$(cat "$secrets/worker_key_id")" ||
    mc admin user info store "$(cat "$secrets/worker_key_id")" | grep -q segpipe-worker
