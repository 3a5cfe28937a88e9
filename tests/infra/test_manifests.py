"""Compose and Kubernetes, held against their schemas; the numbers in them, against the plan."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from world import Ended, World, write_yaml

from segpipe.config.card import read_card
from segpipe.config.job import Tiling, load_job, parse_memory
from segpipe.pipeline.model_scene import dry_plan
from segpipe.runs.check import check_request

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "infra" / "compose" / "compose.yaml"
K8S = ROOT / "infra" / "k8s"
OVERLAYS = sorted(p.parent.name for p in (K8S / "overlays").glob("*/kustomization.yaml"))
KUBERNETES = "1.34"
SECRET = re.compile(r"(password|secret|token|auth_string|key_id|access_key)", re.I)


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    """What a kustomization gathers, before its patches."""
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        path = folder / name
        if path.is_dir():
            yield from documents(path)
        else:
            yield from yaml.safe_load_all(path.read_text())


def pods(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of their owner."""
    return {d["metadata"]["name"]: d["spec"]["template"] for d in found if "template" in d.get("spec", {})}


def containers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for pod in pods(found).values() for c in pod["spec"]["containers"]]


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of it."""
    tool = shutil.which("kustomize") or shutil.which("kubectl")
    if tool is None:
        pytest.skip("neither kustomize nor kubectl is installed: Debian package kubernetes-client")
    word = "build" if tool.endswith("kustomize") else "kustomize"
    done = subprocess.run([tool, word, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


# ------------------------------------------------------------------ compose


def test_compose_follows_the_specification() -> None:
    tool = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_compose_refers_to_what_is_there() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    assert {"server", "database", "store", "worker-cpu", "worker-gpu", "dask-worker"} <= services.keys()
    for name, service in services.items():
        assert set(service.get("secrets", [])) <= compose["secrets"].keys(), name
        for other, how in service.get("depends_on", {}).items():
            checked = "healthcheck" in services[other] or "build" in services[other]  # the image has its own
            assert how["condition"] == "service_completed_successfully" or checked, (name, other)
        build = service.get("build")
        if build:
            context = (COMPOSE.parent / build["context"]).resolve()
            assert context == ROOT and (context / build["dockerfile"]).is_file()
            assert (ROOT / "infra" / "docker" / service["command"][0]).is_file()
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_compose_has_secrets_by_reference_only() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    referred = 0
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                assert key.endswith("_FILE"), (name, key)
                assert Path(value).parent == Path("/run/secrets"), (name, key)
                assert Path(value).name in service["secrets"], (name, key)
                referred += 1
    assert referred >= 12
    for secret in compose["secrets"].values():
        assert secret.keys() == {"file"}


def test_secrets_are_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    make = ["bash", str(COMPOSE.parent / "secrets.sh"), str(folder)]
    subprocess.run(make, check=True, capture_output=True)
    before = {p.name: p.read_text() for p in folder.iterdir()}
    subprocess.run(make, check=True, capture_output=True)
    assert {p.name: p.read_text() for p in folder.iterdir()} == before
    assert before.keys() == yaml.safe_load(COMPOSE.read_text())["secrets"].keys()
    user, password = before["prefect_auth"].split(":")
    assert user == "operator" and len({*before.values(), password}) == 7 and len(password) == 48
    assert folder.stat().st_mode & 0o077 == 0


# ------------------------------------------------------------------ Kubernetes


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_follow_the_schema(overlay: str) -> None:
    found = list(documents(K8S / "overlays" / overlay))
    for document in found:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    names = [(d["kind"], d["metadata"]["name"]) for d in found]
    assert len(set(names)) == len(names)
    wrong = copy.deepcopy(next(d for d in found if d["kind"] in ("Deployment", "ConfigMap")))
    wrong["metadata"]["nmae"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_what_follows_the_schema(overlay: str) -> None:
    rendered = kustomize(K8S / "overlays" / overlay)
    assert len(rendered) == len(list(documents(K8S / "overlays" / overlay)))
    for document in rendered:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "segpipe"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_bounded_and_watched(overlay: str) -> None:
    found = list(documents(K8S / "overlays" / overlay))
    for name, pod in pods(found).items():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
    for container in containers(found):
        name = container["name"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
        assert "memory" in container["resources"]["limits"], name
        assert {"startupProbe", "livenessProbe"} <= container.keys(), name
        ports = {p["name"] for p in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.get(probe, {}).get("httpGet")
            assert asked is None or asked["port"] in ports, (name, probe)
        script = container.get("args", [""])[0]
        assert not container["image"].startswith("segpipe") or (ROOT / "infra/docker" / script).is_file(), (
            name
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_policies_and_budgets_select_pods_that_exist(overlay: str) -> None:
    found = [*documents(K8S / "base"), *documents(K8S / "overlays" / overlay)]
    labels = [pod["metadata"]["labels"] for pod in pods(found).values()]
    for document in found:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            wanted = spec["selector"]
        elif document["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            wanted = spec["selector"]["matchLabels"]
        elif document["kind"] == "NetworkPolicy":
            wanted = spec["podSelector"].get("matchLabels", {})
        else:
            continue
        chosen = [each for each in labels if wanted.items() <= each.items()]
        assert chosen, (document["kind"], document["metadata"]["name"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_have_secrets_by_reference_only(overlay: str) -> None:
    found = list(documents(K8S / "overlays" / overlay))
    assert "Secret" not in {d["kind"] for d in found}
    for container in containers(found):
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}, variable
    for document in found:
        if document["kind"] == "ConfigMap":
            assert not [key for key in document["data"] if SECRET.search(key)]


def test_gpu_workers_have_a_gpu_each_and_go_where_there_are_some() -> None:
    pod = pods(list(documents(K8S / "overlays" / "gpu")))["worker-gpu"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    values = {v["name"]: v.get("value") for v in container["env"]}
    assert (values["SEGPIPE_POOL"], values["SEGPIPE_LIMIT"]) == ("gpu", "1")


def test_a_worker_has_the_memory_that_a_plan_may_take() -> None:
    for name in ("worker-cpu", "dask-worker"):
        found = [*documents(K8S / "base"), *documents(K8S / "overlays" / "dask")]
        resources = pods(found)[name]["spec"]["containers"][0]["resources"]
        assert resources["requests"]["memory"] == "4Gi" and resources["limits"]["memory"] == "5Gi"
    assert parse_memory(Tiling().memory) == 4 * 1024**3


# ------------------------------------------------------------------ what a job takes


@pytest.fixture
def resources(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``resources("job.yaml")``: the script's command line, in this process."""
    path = K8S / "resources.py"
    spec = importlib.util.spec_from_file_location("infra_k8s_resources", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        code = module.main(list(arguments))
        return Ended(code, *capsys.readouterr())

    return run


def test_the_patch_asks_for_what_the_plan_says(
    world: World, tmp_path: Path, resources: Callable[..., Ended]
) -> None:
    scenes = [str(world / "scene1.tif"), str(world / "large.tif"), str(world / "scene2.tif")]
    path = world.job(tmp_path / "out", scenes=scenes, compute={"threads": 3})
    request = check_request(load_job(path, []))
    planned = {
        ref.name: dry_plan(request.job, read_card(request.job.model), ref, request.settings).summary()[
            "memory_bytes"
        ]
        for ref in request.scenes
    }
    assert len(set(planned.values())) == 2
    done = resources(str(path))
    assert done.code == 0, done.err
    assert done.out.startswith("# trial: what large takes, the largest of its scenes\n")
    asked = yaml.safe_load(done.out)["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert int(asked["requests"]["memory"]) == planned["large"] == max(planned.values())
    assert int(asked["limits"]["memory"]) == planned["large"] + 1024**3
    assert asked["requests"]["cpu"] == "3"

    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "memory.yaml").write_text(done.out)
    base = os.path.relpath(K8S / "base", overlay)
    kustomization = {"resources": [base], "patches": [{"path": "memory.yaml"}]}
    write_yaml(overlay / "kustomization.yaml", kustomization)
    patched = kustomize(overlay)
    for document in patched:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    (worker,) = pods(patched)["worker-cpu"]["spec"]["containers"]
    assert worker["resources"]["requests"] == asked["requests"]
    assert worker["args"] == ["worker.sh"] and worker["livenessProbe"], "the patch leaves the rest"


def test_batches_at_once_share_their_libraries(
    world: World, tmp_path: Path, resources: Callable[..., Ended]
) -> None:
    path = world.job(tmp_path / "out")
    request = check_request(load_job(path, []))
    memory = dry_plan(request.job, read_card(request.job.model), request.scenes[0], request.settings).memory
    done = resources(str(path), "--plain", "--set", "compute.workers=4")
    assert done.code == 0, done.err
    asked = yaml.safe_load(done.out)["resources"]["requests"]
    assert int(asked["memory"]) == memory.libraries + 4 * (memory.total - memory.libraries)


def test_a_job_without_a_model_is_refused(
    world: World, tmp_path: Path, resources: Callable[..., Ended]
) -> None:
    labels = {"model": None, "labels": str(world / "truth")}
    done = resources(str(world.job(tmp_path / "out", **labels)))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: model: this job has none")


def test_the_report_of_a_wrong_job_is_a_line(
    world: World, tmp_path: Path, resources: Callable[..., Ended]
) -> None:
    done = resources(str(world.job(tmp_path / "out", tiling={"memory": "64MiB"})))
    assert done.code == 2
    assert "tiling.memory: found 64 MiB" in done.err and len(done.err.splitlines()) == 1
    assert done.out == ""
