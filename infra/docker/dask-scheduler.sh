#!/usr/bin/env bash
# A Dask scheduler for `compute.runner: dask` with `compute.address: tcp://<this host>:8786`.
#   SEGPIPE_HOST, SEGPIPE_DASK_PORT, SEGPIPE_DASHBOARD_PORT     0.0.0.0, 8786, 8787
# Dask lets in whoever reaches the port: keep it inside, or set DASK_DISTRIBUTED__COMM__TLS__* on both sides.
set -euo pipefail
# shellcheck source=infra/docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dashboard=${SEGPIPE_DASHBOARD_PORT:-8787}
healthy_at "http://127.0.0.1:$dashboard/health"
exec dask scheduler --host "${SEGPIPE_HOST:-0.0.0.0}" --port "${SEGPIPE_DASK_PORT:-8786}" \
    --dashboard-address ":$dashboard"
