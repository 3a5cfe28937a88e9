# shellcheck shell=bash
# What every entry point does first. Sourced, not run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034  # the scripts that source this one use it
HERE=$ROOT/infra/docker

# Say one line and end: the request is wrong.
refuse() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# NAME_FILE=/run/secrets/x becomes NAME: secrets reach the container as files, never in its description.
read_secrets() {
    local name file
    for name in PREFECT_SERVER_API_AUTH_STRING PREFECT_API_AUTH_STRING \
        PREFECT_SERVER_DATABASE_CONNECTION_URL PREFECT_SERVER_DATABASE_PASSWORD \
        AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
        file=${name}_FILE
        [ -n "${!file:-}" ] || continue
        [ -r "${!file}" ] || refuse "$file: cannot read ${!file}; name a file this user may read"
        export "$name=$(<"${!file}")"
        unset "$file"
    done
}

# Where health.py asks: the image's HEALTHCHECK knows nothing of the role.
healthy_at() {
    echo "$1" >"${SEGPIPE_HEALTH_FILE:-${TMPDIR:-/tmp}/segpipe-health}"
}

read_secrets
# The image's own tree may be read-only: `runs`, where jobs write that name nothing else, is a link out of it.
mkdir -p "${TMPDIR:-/tmp}"
[ ! -L "$ROOT/runs" ] || mkdir -p "$(readlink "$ROOT/runs")"
export PREFECT_SERVER_ANALYTICS_ENABLED=${PREFECT_SERVER_ANALYTICS_ENABLED:-false}
