"""Send automations to the Prefect server of PREFECT_API_URL; one of the same name is replaced.

    export SEGPIPE_WEBHOOK_URL=https://example.org/hook
    export SEGPIPE_MAIL_URL='mailtos://user:password@smtp.example.org:587?from=segpipe@example.org&to=ops@example.org'
    python infra/automations/create.py infra/automations/failure-*.yaml

Secrets stay in the server's blocks, encrypted. Where a variable is set, its block is made or changed:

- SEGPIPE_WEBHOOK_URL → block ``webhook/segpipe``; SEGPIPE_WEBHOOK_TOKEN, where set, is sent as a bearer token;
- SEGPIPE_MAIL_URL → block ``slack-webhook/segpipe-mail``: Prefect has no block for SMTP, but this one hands
  every address that is not Slack's to Apprise, which knows mailto:// and mailtos://.

The files are what ``prefect automation create --from-file`` reads, but for one thing: an action names its
block by type and name, ``webhook/segpipe``, and the server wants the block's id. ``--print`` prints them with
the ids in, for that command.
"""  # noqa: E501 (an address is one line)

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

ID = "block_document_id"


def make_blocks() -> None:
    """The blocks whose variables are set."""
    if url := os.environ.get("SEGPIPE_WEBHOOK_URL"):
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get("SEGPIPE_WEBHOOK_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        Webhook(url=url, headers=headers).save("segpipe", overwrite=True)
    if url := os.environ.get("SEGPIPE_MAIL_URL"):
        SlackWebhook(url=url).save("segpipe-mail", overwrite=True)


def load(path: Path) -> list[dict[str, Any]]:
    """The automations of a file: one, a list, or under ``automations``."""
    data = yaml.safe_load(path.read_text())
    data = data.get("automations", data) if isinstance(data, dict) else data
    return data if isinstance(data, list) else [data]


def with_ids(automation: dict[str, Any], client: SyncPrefectClient) -> dict[str, Any]:
    """The automation with the ids of its blocks in place of their names.

    Raises:
        SystemExit: the server has no such block.
    """
    actions = []
    for action in automation["actions"]:
        if "/" in action.get(ID, ""):
            kind, name = action[ID].split("/", 1)
            try:
                block = client.read_block_document_by_name(name, kind)
            except ObjectNotFound as error:
                raise SystemExit(
                    f"{automation['name']}: {ID}: no block {action[ID]} on the server; make it in the "
                    "UI, or set SEGPIPE_WEBHOOK_URL or SEGPIPE_MAIL_URL for this command"
                ) from error
            action = {**action, ID: str(block.id)}
        actions.append(action)
    return {**automation, "actions": actions}


def send(automation: dict[str, Any], client: SyncPrefectClient) -> None:
    """Make the automation, in place of those of its name."""
    wanted = AutomationCore.model_validate(automation)
    for old in client.read_automations_by_name(wanted.name):
        client.delete_automation(old.id)
    client.create_automation(wanted)


def read(paths: list[str], client: SyncPrefectClient) -> Iterator[dict[str, Any]]:
    """Every automation of the files, with ids."""
    return (with_ids(automation, client) for path in paths for automation in load(Path(path)))


def main() -> None:
    """Make blocks, then send or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE.yaml")
    parser.add_argument("--print", action="store_true", dest="show", help="print with ids, send nothing")
    arguments = parser.parse_args()
    make_blocks()
    with get_client(sync_client=True) as client:
        automations = list(read(arguments.files, client))
        if arguments.show:
            yaml.safe_dump({"automations": automations}, sys.stdout, sort_keys=False)
            return
        for automation in automations:
            send(automation, client)
            sys.stderr.write(f"automation: {automation['name']}\n")


if __name__ == "__main__":
    main()
