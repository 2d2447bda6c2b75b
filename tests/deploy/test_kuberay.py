"""The KubeRay examples: what the operator's own schemas say of them, and whether their pools fit their nodes."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.placement import ACCELERATOR_LABEL, NODE_LABEL, Node, place
from core.config import ClusterConfig, load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ("raycluster.yaml", "rayjob.yaml")
CRDS = Path(os.environ.get("HETSERVE_DATA", ROOT.parent / "shared" / "data")) / "kuberay-crds"


def documents(name: str) -> dict[str, dict[str, Any]]:
    """By kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((ROOT / "deploy" / name).read_text())}


def ray_cluster(name: str) -> dict[str, Any]:
    found = documents(name)
    spec: dict[str, Any] = found["RayCluster"]["spec"] if "RayCluster" in found else found["RayJob"]["spec"]["rayClusterSpec"]
    return spec


def cluster_config(name: str, folder: Path) -> ClusterConfig:
    """The configuration that the head mounts, with the key that its environment gives."""
    file = folder / "cluster.yaml"
    file.write_text(documents(name)["ConfigMap"]["data"]["cluster.yaml"])
    return load_config(file, {"gateway.api_key": "a-long-enough-key"})


def closed(schema: Any) -> Any:
    """The schema, refusing fields that it does not name: a misspelt one is an error, as in `kubectl apply` with validation."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
    return made


def validator(kind: str) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"no KubeRay schemas in {CRDS}: HETSERVE_DATA names the folder that holds kuberay-crds")
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": {"type": "string"}}}
    return jsonschema.Draft7Validator(closed(schema))


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_an_example_is_what_the_operator_accepts(name: str, kind: str) -> None:
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator(kind).iter_errors(documents(name)[kind])]
    assert found == []


def test_a_misspelt_field_is_found() -> None:
    document = documents("raycluster.yaml")["RayCluster"]
    document["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert [error.message for error in validator("RayCluster").iter_errors(document) if "minReplica" in error.message]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_pools_fit_the_nodes_of_their_example(name: str, tmp_path: Path) -> None:
    nodes = [Node("head", "head", "10.0.0.1", {NODE_LABEL: "head"})]
    for group in ray_cluster(name)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for index in range(group["replicas"]):
            own = f"{group['groupName']}-{index}"
            held = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
            labels = {NODE_LABEL: own, ACCELERATOR_LABEL: group["labels"][ACCELERATOR_LABEL]}
            nodes.append(Node(own, own, f"10.0.1.{len(nodes)}", labels, held, dict(held)))
    placements = place(cluster_config(name, tmp_path), nodes)
    assert {placement.node for placement in placements.values()} == {node.name for node in nodes} - {"head"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gateways_port_and_configuration_are_on_the_head(name: str, tmp_path: Path) -> None:
    (container,) = ray_cluster(name)["headGroupSpec"]["template"]["spec"]["containers"]
    assert cluster_config(name, tmp_path).gateway.port in [port["containerPort"] for port in container["ports"]]
    (mount,) = container["volumeMounts"]
    volumes = {volume["name"]: volume for volume in ray_cluster(name)["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert volumes[mount["name"]]["configMap"]["name"] == documents(name)["ConfigMap"]["metadata"]["name"]
    if "RayJob" in documents(name):
        command = shlex.split(documents(name)["RayJob"]["spec"]["entrypoint"])
        assert command == ["hetserve", "serve", "--config", f"{mount['mountPath']}/cluster.yaml"]
