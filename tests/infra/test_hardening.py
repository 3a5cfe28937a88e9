"""What each container may do: who it is, what it writes, whom it reaches, whose keys it has.

Every service of compose and every pod of Kubernetes is asked, so a new one that says nothing fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
import yaml
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "infra" / "compose"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
NETWORKS: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["networks"]
WORKERS = {"worker-cpu", "worker-gpu", "dask-worker"}
K8S = ROOT / "infra" / "k8s"


# ------------------------------------------------------------------ compose


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gives_up_what_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service and service["pids_limit"] > 0
    assert not service.keys() & {"privileged", "devices", "pid", "ipc", "userns_mode"}
    user = service["user"].split(":")[0]
    if name == "store-owner":  # root, so that it can give the volume away: without network and secrets
        assert service["cap_add"] == ["CHOWN"] and service["network_mode"] == "none"
        assert service["entrypoint"][0] == "chown" and "secrets" not in service
    else:
        assert int(user) > 0 and "cap_add" not in service and service["networks"]


def peers(name: str) -> set[str]:
    """Services that share a network with it."""
    mine = set(SERVICES[name].get("networks", []))
    return {other for other, service in SERVICES.items() if mine & set(service.get("networks", []))} - {name}


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("database", {"server"}),
        ("store", {"buckets"} | WORKERS),
        ("buckets", {"store"} | WORKERS),
        ("server", {"database"} | WORKERS),
        ("dask-scheduler", WORKERS),
        ("store-owner", set()),
        *(
            (worker, {"server", "store", "buckets", "dask-scheduler"} | WORKERS - {worker})
            for worker in sorted(WORKERS)
        ),
    ],
)
def test_a_service_reaches_those_that_it_needs(name: str, reached: set[str]) -> None:
    assert peers(name) == reached
    for other in SERVICES[name].get("depends_on", {}):
        assert other in reached | {"store-owner"} or other == "buckets", "it waits for one it cannot reach"


def test_only_the_server_is_on_a_network_with_a_way_out() -> None:
    outside = {name for name, network in NETWORKS.items() if not network.get("internal")}
    assert outside == {"front"}
    assert {name for name, service in SERVICES.items() if "front" in service.get("networks", [])} == {
        "server"
    }
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"server"}


def test_the_second_file_opens_lakes_to_workers_alone() -> None:
    second = yaml.safe_load((COMPOSE / "lakes.yaml").read_text())
    assert second["services"].keys() == WORKERS
    assert all(service == {"networks": ["lakes"]} for service in second["services"].values())
    assert second["networks"] == {"lakes": {}}


def test_the_roots_keys_of_the_store_are_the_stores_alone() -> None:
    holders = {
        secret: {name for name, service in SERVICES.items() if secret in service.get("secrets", [])}
        for secret in ("store_key", "store_key_id", "worker_key", "worker_key_id", "database_password")
    }
    assert holders["store_key"] == holders["store_key_id"] == {"store", "buckets"}
    assert holders["worker_key"] == holders["worker_key_id"] == {"buckets"} | WORKERS
    assert holders["database_password"] == {"database", "server"}


# ------------------------------------------------------------------ the workers' user


@pytest.fixture(scope="module")
def clients() -> Iterator[tuple[Any, Any]]:
    """S3 by root and by a user who has the policy, on a store that enforces policies."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"

    def client(service: str, key: str, secret: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )

    def unchecked(requests: str) -> None:
        """How many requests come through before policies are asked."""
        ask = urllib.request.Request(f"{url}/moto-api/reset-auth", requests.encode(), method="POST")
        ask.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(ask, timeout=10)

    root, users = client("s3", "root", "root-secret"), client("iam", "root", "root-secret")
    for bucket in ("lake", "runs", "other"):
        root.create_bucket(Bucket=bucket)
        root.put_object(Bucket=bucket, Key="there", Body=b"x")
    users.create_user(UserName="worker")
    policy = (COMPOSE / "worker-policy.json").read_text()
    users.put_user_policy(UserName="worker", PolicyName="segpipe-worker", PolicyDocument=policy)
    key = users.create_access_key(UserName="worker")["AccessKey"]
    unchecked("0")
    try:
        yield root, client("s3", key["AccessKeyId"], key["SecretAccessKey"])
    finally:
        unchecked("inf")
        server.stop()


ACTS = {
    "list": lambda s3, bucket: s3.list_objects_v2(Bucket=bucket),
    "read": lambda s3, bucket: s3.get_object(Bucket=bucket, Key="there"),
    "write": lambda s3, bucket: s3.put_object(Bucket=bucket, Key="new", Body=b"y"),
    "remove": lambda s3, bucket: s3.delete_object(Bucket=bucket, Key="new"),
    "remove bucket": lambda s3, bucket: s3.delete_bucket(Bucket=bucket),
    "policy": lambda s3, bucket: s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Statement": []})),
}
ALLOWED = {"lake": {"list", "read"}, "runs": {"list", "read", "write", "remove"}, "other": set[str]()}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bucket", ALLOWED)
def test_a_worker_may_do_this_and_no_more(clients: tuple[Any, Any], bucket: str, act: str) -> None:
    _, worker = clients
    if act in ALLOWED[bucket]:
        ACTS[act](worker, bucket)
        return
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        ACTS[act](worker, bucket)
    assert caught.value.response["Error"]["Code"] == "AccessDenied"


def test_the_script_makes_the_user_and_shows_no_secret(tmp_path: Path) -> None:
    """With a program in place of the store's client, which notes its arguments and what it reads."""
    secrets = tmp_path / "secrets"
    subprocess.run(["bash", COMPOSE / "secrets.sh", secrets], check=True, capture_output=True)
    client = tmp_path / "mc"
    client.write_text(
        '#!/bin/sh\necho "$*" >>"$NOTES"\n[ "$3" != add ] || cat >>"$NOTES.read"\n'
        'case "$*" in *attach*) [ -z "$AGAIN" ] ;; *info*) echo segpipe-worker ;; esac\n'
    )
    client.chmod(0o755)
    keys = {path.name: path.read_text() for path in secrets.iterdir()}
    for again in ("", "yes"):  # a second time, attaching is an error of the client
        environment = {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "NOTES": str(tmp_path / f"notes{again}"),
            "AGAIN": again,
            "SEGPIPE_STORE": "store:9000",
            "SEGPIPE_SECRETS": str(secrets),
        }
        subprocess.run(["sh", COMPOSE / "buckets.sh"], env=environment, check=True, capture_output=True)
        noted = (tmp_path / f"notes{again}").read_text()
        assert f"admin policy create store segpipe-worker {COMPOSE / 'worker-policy.json'}\n" in noted
        assert f"admin policy attach store segpipe-worker --user {keys['worker_key_id']}\n" in noted
        assert not [name for name in ("store_key", "worker_key") if keys[name] in noted]
        read = (tmp_path / f"notes{again}.read").read_text()
        assert read == f"{keys['worker_key_id']}\n{keys['worker_key']}\n"


# ------------------------------------------------------------------ Kubernetes


def documents(*paths: str) -> list[dict[str, Any]]:
    """All that the files of these folders say."""
    files = [
        file
        for path in paths
        for file in sorted((K8S / path).glob("*.yaml"))
        if file.name != "kustomization.yaml"
    ]
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


EVERYTHING = documents("base", "overlays/dask", "overlays/gpu", "overlays/dask-operator")
PODS = {
    **{
        d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"]
        for d in EVERYTHING
        if "template" in d.get("spec", {})
    },
    # as the Dask operator labels what it starts
    "operator's worker": {"dask.org/cluster-name": "x", "dask.org/component": "worker"},
    "operator's scheduler": {"dask.org/cluster-name": "x", "dask.org/component": "scheduler"},
}
ELSEWHERE = {
    "dns": ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}),
    "store": ({"segpipe.org/is-store": "true"}, {}),
}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' label selectors, those two kinds of expressions that are used here."""
    for expression in selector.get("matchExpressions", []):
        key, operator = expression["key"], expression["operator"]
        assert operator in ("In", "Exists"), operator
        if key not in labels or (operator == "In" and labels[key] not in expression["values"]):
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def let_through(peer: dict[str, Any], namespace: dict[str, str] | None, labels: dict[str, str]) -> bool:
    """Whether a peer of a rule is this pod; a namespace of None is the policy's own."""
    if "ipBlock" in peer:
        return False
    if ("namespaceSelector" in peer) != (namespace is not None):
        return False
    return selects(peer.get("namespaceSelector", {}), namespace or {}) and selects(
        peer.get("podSelector", {}), labels
    )


def reach(direction: str, name: str, policies: list[dict[str, Any]]) -> set[str]:
    """Pods that policies let it reach (Egress) or be reached by (Ingress); ``anyone`` without a policy."""
    word = {"Egress": "to", "Ingress": "from"}[direction]
    chosen = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], PODS[name])]
    chosen = [spec for spec in chosen if direction in spec["policyTypes"]]
    if not chosen:
        return {"anyone"}
    found = set[str]()
    for rule in (rule for spec in chosen for rule in spec.get(direction.lower(), [])):
        assert rule.get(word), "a rule without peers lets everyone through"
        for peer in rule[word]:
            if "ipBlock" in peer:
                found.add(f"{peer['ipBlock']['cidr']}")
            found |= {other for other, labels in PODS.items() if let_through(peer, None, labels)}
            found |= {
                other for other, (space, labels) in ELSEWHERE.items() if let_through(peer, space, labels)
            }
    return found


POLICIES = [
    d for d in EVERYTHING if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] != "kubernetes-api"
]
CLUSTER = {"dask-scheduler", "dask-worker", "operator's worker", "operator's scheduler"}
OF_WORKERS = {"dns", "server", "store", *CLUSTER}
EGRESS = {
    "server": {"dns", "postgres"},
    "postgres": {"dns"},
    "worker-cpu": OF_WORKERS,
    "worker-gpu": OF_WORKERS,
    "dask-worker": OF_WORKERS,
    "dask-scheduler": {"dns", "dask-scheduler", "dask-worker"},
    "operator's worker": OF_WORKERS,
    "operator's scheduler": OF_WORKERS,
}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_reaches_those_that_it_needs(name: str) -> None:
    assert reach("Egress", name, POLICIES) == EGRESS[name]


def test_only_the_server_reaches_the_database() -> None:
    assert reach("Ingress", "postgres", POLICIES) == {"server"}
    assert {name for name in PODS if "postgres" in reach("Egress", name, POLICIES)} == {"server"}


def test_without_a_policy_of_its_own_a_pod_reaches_the_dns_alone() -> None:
    PODS["new"] = {"app.kubernetes.io/name": "new"}
    try:
        assert reach("Egress", "new", POLICIES) == {"dns"}
        assert reach("Ingress", "new", POLICIES) == set()
    finally:
        del PODS["new"]


def test_what_opens_the_way_out_leaves_private_networks_and_metadata_closed() -> None:
    opened = documents("components/outside")
    for name in PODS.keys() - {"postgres", "dask-scheduler", "operator's scheduler"}:
        assert reach("Egress", name, [*POLICIES, *opened]) == EGRESS[name] | {"0.0.0.0/0"}
    for document in opened:
        [rule] = document["spec"]["egress"]
        [block] = rule["to"]
        assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"} <= set(
            block["ipBlock"]["except"]
        )
        assert rule["ports"] == [{"protocol": "TCP", "port": 443}]


def test_a_cluster_of_the_operator_is_let_into_a_restricted_namespace() -> None:
    spec = yaml.safe_load((ROOT / "infra/dask/kubernetes-gpu.yaml").read_text())["custom_cluster_spec"][
        "spec"
    ]
    for part in ("scheduler", "worker"):
        pod = spec[part]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted == {"/tmp", "/var/lib/segpipe"}
