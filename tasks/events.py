"""What automations can listen to: an event for each scene that ended."""

from __future__ import annotations

from prefect.events import emit_event

from segpipe.export.run_folder import RunFolder
from segpipe.store.location import join
from segpipe.tables.record import SceneRecord


def tell_scene(run: RunFolder, record: SceneRecord) -> None:
    """Emit ``segpipe.scene.done`` or ``segpipe.scene.failed``, with the run and the files."""
    scene = {"prefect.resource.id": f"segpipe.scene.{record.name}", "prefect.resource.name": record.name}
    folder = {"prefect.resource.id": f"segpipe.run.{run.name}", "prefect.resource.role": "run"}
    files = {what: join(run.location, path) for what, path in record.files.items()}
    emit_event(
        event=f"segpipe.scene.{record.state}",
        resource={**scene, "segpipe.job": run.job},
        related=[folder],
        payload={"job": run.job, "run": run.location, "error": record.error, "files": files},
    )
