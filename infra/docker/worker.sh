#!/usr/bin/env bash
# A Prefect worker: runs flows as processes of this container.
#   PREFECT_API_URL             the server, http://server:4200/api
#   PREFECT_API_AUTH_STRING     what the server wants of its callers; or PREFECT_API_AUTH_STRING_FILE
#   SEGPIPE_POOL                the work pool to poll: cpu or gpu (cpu)
#   SEGPIPE_QUEUES              its queues, apart by spaces (all)
#   SEGPIPE_LIMIT               flow runs at once (1: one per GPU, and the memory that `plan` says)
#   SEGPIPE_WAIT                seconds to wait for the server (300)
#   SEGPIPE_DEPLOY=true         make the work pools and the deployments of infra/prefect.yaml first
#   SEGPIPE_GPUS, SEGPIPE_HOME  for that: GPUs of all workers, and the folder runs start in; see infra/pools.sh
#   SEGPIPE_HEALTH_PORT         where /health is answered (8080)
set -euo pipefail
# shellcheck source=infra/docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ -n "${PREFECT_API_URL:-}" ] || refuse "PREFECT_API_URL: not set; give the server, as in http://server:4200/api"
pool=${SEGPIPE_POOL:-cpu}
export PREFECT_WORKER_WEBSERVER_PORT=${SEGPIPE_HEALTH_PORT:-8080}

python "$HERE/health.py" "$PREFECT_API_URL/health" --wait "${SEGPIPE_WAIT:-300}"
cd "$ROOT"
if [ "${SEGPIPE_DEPLOY:-false}" = true ]; then
    SEGPIPE_POOL=process SEGPIPE_HOME=${SEGPIPE_HOME:-$ROOT} bash infra/pools.sh  # there it is the pools' type
    prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml
fi
queues=()
for queue in ${SEGPIPE_QUEUES:-}; do queues+=(--work-queue "$queue"); done
healthy_at "http://127.0.0.1:$PREFECT_WORKER_WEBSERVER_PORT/health"
exec prefect worker start --pool "$pool" --type process --name "${SEGPIPE_WORKER_NAME:-$pool-$(uname -n)}" \
    --limit "${SEGPIPE_LIMIT:-1}" --install-policy never --with-healthcheck "${queues[@]}"
