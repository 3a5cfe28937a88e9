"""A laptop's deployments: a local Prefect server, and this process as its worker."""

from __future__ import annotations

import os
from importlib import import_module

from segpipe.errors import SegpipeError
from segpipe_flows.deployments import DEPLOYMENTS
from segpipe_flows.server import answers, local_server


def serve_locally(host: str, port: int, limit: int = 1) -> None:
    """Serve every deployment on a server at ``host:port``, which is started if none answers.

    Args:
        host: of the Prefect server.
        port: of the Prefect server.
        limit: runs at once; the others wait. One, because two on one GPU have half its memory each.
    """
    with local_server(host, port) as api:
        os.environ["PREFECT_API_URL"] = api  # before prefect is imported and reads its settings
        prefect = import_module("prefect")
        load = import_module("prefect.flows").load_flow_from_entrypoint
        module_path = import_module("prefect.types.entrypoint").EntrypointType.MODULE_PATH
        server_in_use = import_module("segpipe_flows.here").server_in_use
        served = (
            load(each.entrypoint, use_placeholder_flow=False).to_deployment(
                name=each.name,
                description=each.description,
                tags=[*each.tags],
                parameters=dict(each.parameters),
                entrypoint_type=module_path,
            )
            for each in DEPLOYMENTS
        )
        # schedules that somebody set in the UI stay as they are when the laptop is closed
        try:
            with server_in_use():
                prefect.serve(*served, limit=limit, pause_on_shutdown=False)
        except SystemExit as ended:
            if ended.code != 0:
                raise  # 0 is how it ends on SIGTERM: what it was to do is done
        except Exception as error:
            if answers(api):
                raise
            raise SegpipeError(f"the Prefect server at {api} has ended, and serving with it") from error
