"""Checks deploy/ and ray-cluster.yaml without a cloud: `python deploy/lint.py [FILE]`.

A file of `ray up` is checked against Ray's schema and the EC2 API's parameters, which catch a
misspelt `node_config`. Further checks find what both accept: a missing security group (Ray would
open port 22 to the world), a missing instance profile (no S3), images of another Ray or Python,
missing files, a public dashboard. A Kubernetes file is checked for KubeRay's fields
(kuberay/schema.json), versions, tokens and resources, a compose file for keys, versions, ports and
secrets.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def problems(path: Path) -> Iterator[str]:
    """Give what is wrong with the cluster definition at `path`."""
    definition = yaml.safe_load(path.read_text())
    if definition.get("apiVersion") == "ray.io/v1":
        yield from _of_kuberay(definition)
        return
    if "services" in definition:
        yield from _of_compose(definition)
        return
    schema = list(_of_schema(definition))
    yield from schema
    if schema:
        return
    yield from _of_node_types(definition)
    for name, node in definition.get("available_node_types", {}).items():
        for problem in _of_node(node.get("node_config", {})):
            yield f"available_node_types.{name}.node_config: {problem}"
    yield from _of_versions(definition)
    yield from _of_files(definition, path.parent)
    yield from _of_commands(definition)


def _of_schema(definition: dict[str, Any]) -> Iterator[str]:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    yield from _errors(jsonschema.Draft7Validator(schema), definition)


def _errors(validator: Any, definition: dict[str, Any]) -> Iterator[str]:
    for error in validator.iter_errors(definition):
        yield f"{'.'.join(map(str, error.absolute_path)) or 'file'}: {error.message}"


def _of_node_types(definition: dict[str, Any]) -> Iterator[str]:
    types = definition.get("available_node_types", {})
    if definition.get("head_node_type") not in types:
        yield f"head_node_type: must be one of available_node_types ({', '.join(types)})"
    most = definition.get("max_workers", 2)  # Ray's default
    for name, node in types.items():
        least = node.get("min_workers", 0)
        if least > node.get("max_workers", most):
            yield f"available_node_types.{name}: min_workers {least} exceeds its max_workers"
    if (least := sum(node.get("min_workers", 0) for node in types.values())) > most:
        yield f"max_workers: {most} is less than the {least} min_workers of all node types"


def _of_node(config: dict[str, Any]) -> Iterator[str]:
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**config, "MinCount": 1, "MaxCount": 1}, shape)
    if report.has_errors():
        yield " ".join(report.generate_report().split())
    if not config.get("SecurityGroupIds"):
        yield "no SecurityGroupIds: Ray would make a group with port 22 open to the world"
    if not config.get("IamInstanceProfile"):
        yield "no IamInstanceProfile: the node could not read or write S3"
    if config.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield "MetadataOptions.HttpTokens: expected 'required' (IMDSv2)"


def _of_versions(definition: dict[str, Any]) -> Iterator[str]:
    pinned = _pinned()
    for key in ("head_image", "worker_image"):
        image = definition.get("docker", {}).get(key, "")
        if not re.search(rf":{re.escape(pinned['ray'])}-py311\b", image):
            yield f"docker.{key}: '{image}' is not Ray {pinned['ray']} with Python 3.11"
    commands = " ".join(definition.get("setup_commands", []))
    for words in ("--requirement /home/ray/requirements-torch.txt", REQUIRE_LOCK):
        if words not in commands:
            yield f"setup_commands: expected pip install {words}"


def _pinned(lock: Path = ROOT / "requirements.lock") -> dict[str, str]:
    """Return the versions in a file of locked requirements."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.M))


def _of_kuberay(definition: dict[str, Any]) -> Iterator[str]:
    import jsonschema

    schema = json.loads((ROOT / "deploy" / "kuberay" / "schema.json").read_text())
    if definition["kind"] not in schema["definitions"]:
        yield f"kind: '{definition['kind']}' is not RayCluster or RayJob"
        return
    schema["$ref"] = f"#/definitions/{definition['kind']}"
    wrong = list(_errors(jsonschema.Draft7Validator(schema), definition))
    yield from wrong
    if wrong:
        return
    spec = definition["spec"]
    if definition["kind"] == "RayJob":
        words = spec.get("entrypoint", "").split()
        for word in words:
            if word.endswith(".yaml") and not (ROOT / word).exists():
                yield f"spec.entrypoint: there is no {word}"
        if "python" not in words:
            yield "spec.entrypoint: expected python -m jobs...."
        return
    ray = _pinned()["ray"]
    if spec.get("rayVersion") != ray:
        yield f"spec.rayVersion: '{spec.get('rayVersion')}' is not Ray {ray}"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "spec.authOptions.mode: expected token (who reaches the dashboard runs code)"
    if spec["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
        yield "spec.headGroupSpec.serviceType: expected ClusterIP, not reached from outside"
    for group in spec.get("workerGroupSpecs", ()):
        yield from _of_leaving(group["template"]["spec"])
    for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", ())):
        for container in group["template"]["spec"]["containers"]:
            name, resources = container["name"], container.get("resources", {})
            if not container["image"].endswith(f":{ray}"):
                yield f"{name}: image '{container['image']}' is not of Ray {ray}"
            if not resources.get("limits") or resources.get("limits") != resources.get("requests"):
                yield f"{name}: expected limits like the requests: Ray counts on them"


def _of_leaving(pod: dict[str, Any]) -> Iterator[str]:
    """Give what is wrong with how a worker's pod goes: drained first, as long as its notice."""
    grace = pod.get("terminationGracePeriodSeconds", 30)
    for container in pod["containers"]:
        words = " ".join(
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ())
        )
        limit = re.search(r"\btimeout (\d+)\b", words)
        if "ray drain-node" not in words:
            yield f"{container['name']}: expected a preStop hook that runs `ray drain-node`"
        elif not limit or int(limit[1]) >= grace:
            yield f"{container['name']}: expected a preStop hook that ends within {grace} s"


REQUIRE_LOCK = "--require-hashes --requirement /home/ray/requirements.lock"
COMPOSE_KEYS = {
    *("image", "build", "command", "environment", "volumes", "ports", "configs", "secrets"),
    *("depends_on", "healthcheck", "restart", "networks"),
}


def _of_compose(definition: dict[str, Any]) -> Iterator[str]:
    for name, service in definition["services"].items():
        for key in service.keys() - COMPOSE_KEYS:
            yield f"services.{name}.{key}: unknown key"
        for other in service.get("depends_on", ()):
            if other not in definition["services"]:
                yield f"services.{name}.depends_on: there is no service '{other}'"
        if "image" in service and not re.search(r":[\d.]+$", service["image"]):
            yield f"services.{name}.image: '{service['image']}' names no version"
        for port in service.get("ports", ()):
            if not str(port).startswith("127.0.0.1:"):
                yield f"services.{name}.ports: {port} is open to the world"
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY", key) and not str(value).startswith("${"):
                yield f"services.{name}.environment.{key}: a secret in the file; take it from .env"
    if "--require-hashes --requirement /requirements.lock" not in json.dumps(definition):
        yield "services.mlflow.build: expected pip install --require-hashes of requirements.lock"


def _of_files(definition: dict[str, Any], folder: Path) -> Iterator[str]:
    for remote, local in definition.get("file_mounts", {}).items():
        if not local.startswith("~") and not (folder / local).exists():
            yield f"file_mounts.{remote}: there is no {local}"


def _of_commands(definition: dict[str, Any]) -> Iterator[str]:
    head = " ".join(definition.get("head_start_ray_commands", []))
    if "--dashboard-host=127.0.0.1" not in head:
        yield "head_start_ray_commands: expected --dashboard-host=127.0.0.1 (who sees it runs code)"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [c for c in definition.get(key, []) if "ray start" in c]
        if not all("RAY_AUTH_MODE=token" in command for command in starts):
            yield f"{key}: expected RAY_AUTH_MODE=token before `ray start`"
    if re.search(r"[0-9a-f]{32}", json.dumps([head, definition.get("setup_commands")])):
        yield "a token in the file: let it travel as ~/.ray/auth_token"


def main() -> None:
    """Print what is wrong; exit status 1 if anything is."""
    ours = [ROOT / "ray-cluster.yaml", *sorted((ROOT / "deploy").glob("*/*.yaml"))]
    paths = [Path(word) for word in sys.argv[1:]] or ours
    found = [f"error: {path.name}: {problem}" for path in paths for problem in problems(path)]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
