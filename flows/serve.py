"""A laptop's deployment: a local Prefect server, and this process as its worker."""

from __future__ import annotations

import os
from importlib import import_module

from flows.server import local_server


def serve_locally(host: str, port: int) -> None:
    """Serve the flows of this package on a server at ``host:port``, which is started if none answers."""
    with local_server(host, port) as api:
        os.environ["PREFECT_API_URL"] = api  # before prefect is imported and reads its settings
        prefect = import_module("prefect")
        module_path = import_module("prefect.types.entrypoint").EntrypointType.MODULE_PATH
        flows = (
            import_module("flows.segment").segment,
            import_module("flows.prompt").prompt,
            import_module("flows.train").train_model,
        )
        prefect.serve(*(flow.to_deployment(name=flow.name, entrypoint_type=module_path) for flow in flows))
