#!/usr/bin/env bash
# The Prefect server with its pages.
#   SEGPIPE_HOST, SEGPIPE_PORT          where it listens (0.0.0.0, 4200)
#   PREFECT_SERVER_API_AUTH_STRING      user:password that every request must carry; or ..._FILE
#   SEGPIPE_OPEN=true                   without one: whoever reaches the port may run anything
#   PREFECT_SERVER_DATABASE_*           DRIVER=postgresql+asyncpg, HOST, USER, NAME, PASSWORD(_FILE);
#                                       left out: SQLite in PREFECT_HOME
set -euo pipefail
# shellcheck source=infra/docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

host=${SEGPIPE_HOST:-0.0.0.0} port=${SEGPIPE_PORT:-4200}
if [ -z "${PREFECT_SERVER_API_AUTH_STRING:-}" ] && [ "${SEGPIPE_OPEN:-false}" != true ]; then
    refuse "PREFECT_SERVER_API_AUTH_STRING: not set; give user:password (or its file in" \
        "PREFECT_SERVER_API_AUTH_STRING_FILE), or SEGPIPE_OPEN=true for a server that lets everyone in"
fi
# Pages ask the server they came from, whatever name the operator reached it by.
export PREFECT_SERVER_UI_API_URL=${PREFECT_SERVER_UI_API_URL:-/api}
healthy_at "http://127.0.0.1:$port/api/health"
exec prefect server start --host "$host" --port "$port"
