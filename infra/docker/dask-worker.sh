#!/usr/bin/env bash
# A Dask worker: one process, one thread; segpipe itself keeps the cores or the GPU busy.
#   SEGPIPE_DASK_SCHEDULER      tcp://scheduler:8786
#   SEGPIPE_GPUS                auto: the GPUs this container sees; 0: none. With one, batches of jobs on
#                               CUDA come here (resource GPU=1). Give each GPU a container of its own.
#   SEGPIPE_MEMORY              bytes (4GiB) that Dask restarts the worker at (auto: the container's limit)
#   SEGPIPE_WORKERS             processes, on a CPU (1)
#   SEGPIPE_SCRATCH             folder for what Dask spills (the temporary one)
#   SEGPIPE_DASHBOARD_PORT      where /health is answered (8788)
set -euo pipefail
# shellcheck source=infra/docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ -n "${SEGPIPE_DASK_SCHEDULER:-}" ] ||
    refuse "SEGPIPE_DASK_SCHEDULER: not set; give the scheduler, as in tcp://scheduler:8786"
gpus=${SEGPIPE_GPUS:-auto} workers=${SEGPIPE_WORKERS:-1} dashboard=${SEGPIPE_DASHBOARD_PORT:-8788}
if [ "$gpus" = auto ]; then
    gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)
fi
case $gpus in
0) resources=() ;;
1)
    [ "$workers" = 1 ] || refuse "SEGPIPE_WORKERS: found $workers; a container with a GPU has 1 worker"
    resources=(--resources GPU=1)
    ;;
*) refuse "SEGPIPE_GPUS: found $gpus; a container has 0 or 1: start one for each GPU, or use runner dask-cuda" ;;
esac
healthy_at "http://127.0.0.1:$dashboard/health"
exec dask worker "$SEGPIPE_DASK_SCHEDULER" --nworkers "$workers" --nthreads 1 \
    --memory-limit "${SEGPIPE_MEMORY:-auto}" --local-directory "${SEGPIPE_SCRATCH:-${TMPDIR:-/tmp}}" \
    --dashboard-address ":$dashboard" --death-timeout 300 "${resources[@]}"
