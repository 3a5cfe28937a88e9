#!/usr/bin/env bash
# Work pools and queues that infra/prefect.yaml names, on the server of PREFECT_API_URL. May be run again.
#
#   SEGPIPE_HOME   folder in which runs start, so where configs/ and relative locations are found (default: here)
#   SEGPIPE_GPUS   runs at once in the pool `gpu` (default: GPUs of this machine, at least 1)
#   SEGPIPE_POOL   type of the pools: process (default), docker, kubernetes, …
set -euo pipefail

home=${SEGPIPE_HOME:-$PWD}
type=${SEGPIPE_POOL:-process}
gpus=${SEGPIPE_GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
template=$(mktemp --suffix .json)
trap 'rm -f "$template"' EXIT

prefect work-pool get-default-base-job-template --type "$type" --file "$template"
# a process would start in an empty temporary folder; containers have the folder of their image
[ "$type" != process ] || python3 - "$template" "$home" <<'PYTHON'
import json, pathlib, sys
path, home = pathlib.Path(sys.argv[1]), sys.argv[2]
template = json.loads(path.read_text())
template["variables"]["properties"]["working_dir"]["default"] = home
path.write_text(json.dumps(template))
PYTHON

for pool in cpu gpu; do
    prefect work-pool create "$pool" --type "$type" --base-job-template "$template" --overwrite
    # a worker takes what is in `now` before anything in `batch`
    for queue in now:1 batch:10; do
        prefect work-queue create "${queue%:*}" --pool "$pool" --priority "${queue#*:}" ||
            prefect work-queue inspect "${queue%:*}" --pool "$pool"  # it is there already, or this fails too
    done
done
# One run for each GPU: here over all workers, and by `--limit 1` for each worker, which sees one GPU
# (CUDA_VISIBLE_DEVICES). A run that waits for a slot is shown as Late.
prefect work-pool set-concurrency-limit gpu "$(( gpus > 0 ? gpus : 1 ))"
