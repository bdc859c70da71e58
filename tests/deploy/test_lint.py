"""The cluster's definition is sound, and what usually goes wrong in one is found."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ray-cluster.yaml"


@pytest.fixture(scope="module")
def problems():
    spec = importlib.util.spec_from_file_location("deploy_lint", ROOT / "deploy" / "lint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.problems


@pytest.mark.parametrize("file", [FILE, *sorted(ROOT.glob("deploy/*/*.yaml"))], ids=str)
def test_ours_is_sound(problems, file):
    assert list(problems(file)) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "found"),
    [
        ("kuberay/raycluster.yaml", "mode: token", "mode: disabled", "expected token"),
        ("kuberay/raycluster.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.9"', "is not Ray"),
        ("kuberay/raycluster.yaml", "gfl:2.60.0", "gfl:latest", "is not of Ray 2.60.0"),
        ("kuberay/raycluster.yaml", "ClusterIP", "LoadBalancer", "not reached from outside"),
        ("kuberay/raycluster.yaml", 'limits: {cpu: "8"', 'limits: {cpu: "9"', "like the requests"),
        ("kuberay/raycluster.yaml", "preStop", "postStart", "hook that runs `ray drain-node`"),
        ("kuberay/raycluster.yaml", "Seconds: 110", "Seconds: 90", "hook that ends within 90 s"),
        ("kuberay/rayjob.yaml", "gfl_r50_1x.yaml", "gfl_r50.yaml", "there is no configs/gfl_r50"),
        ("kuberay/raycluster.yaml", "minReplicas", "minReplica", "'minReplica' was unexpected"),
        ("kuberay/raycluster.yaml", "volumeMounts", "volumeMount", "'volumeMount' was unexpected"),
        ("kuberay/raycluster.yaml", "mode: token", "mode: tokens", "'tokens' is not one of"),
        ("kuberay/raycluster.yaml", 'num-cpus: "0"', "num-cpus: 0", "is not of type 'string'"),
        ("kuberay/raycluster.yaml", "kind: RayCluster", "kind: RayClustr", "is not RayCluster"),
        ("kuberay/rayjob.yaml", "ray.io/cluster: gfl", "cluster: gfl", "is a required property"),
        (
            "kuberay/rayjob.yaml",
            "  clusterSelector",
            "  ttlSecondsAfterFinished: 60\n  clusterSelector",
            "'shutdownAfterJobFinishes' is a required property",
        ),
        ("mlflow/compose.yaml", "healthcheck:", "healtcheck:", "database.healtcheck: unknown key"),
        ("mlflow/compose.yaml", "depends_on: {database", "depends_on: {db", "no service 'db'"),
        ("mlflow/compose.yaml", "127.0.0.1:5000", "5000", "open to the world"),
        ("mlflow/compose.yaml", "postgres:17.2", "postgres", "names no version"),
        ("mlflow/compose.yaml", "${S3_SECRET:?}", "abc", "a secret in the file"),
        ("mlflow/compose.yaml", "--require-hashes", "", "expected pip install --require-hashes"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(problems, tmp_path, file, before, after, found):
    text = (ROOT / "deploy" / file).read_text()
    assert before in text
    path = tmp_path / "file.yaml"
    path.write_text(text.replace(before, after))
    assert any(found in problem for problem in problems(path)), list(problems(path))


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("InstanceType: m6i.large", "InstanceTyp: m6i.large", "InstanceTyp"),
        ("MarketType: spot", "MarketTyp: spot", "MarketTyp"),
        ("max_workers: 8\nupscaling", "max_wrokers: 8\nupscaling", "max_wrokers"),
        ("      SecurityGroupIds: [sg-00000000000000000] # port", "      # port", "port 22 open"),
        ("IamInstanceProfile: {Arn: \"arn:aws:iam::000000000000:instance-profile/gfl-worker\"}",
         "Monitoring: {Enabled: true}", "could not read or write S3"),
        ("ray:2.60.0-py311-gpu", "ray:2.59.0-py311-gpu", "is not Ray 2.60.0"),
        ("--require-hashes", "", "expected pip install --require-hashes"),
        ("deploy/spot.py", "platform/spott.py", "there is no platform/spott.py"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "who sees it runs code"),
        ("  - RAY_AUTH_MODE=token ray start --address", "  - ray start --address", "AUTH_MODE"),
        ("head_node_type: head", "head_node_type: hed", "must be one of"),
        ("HttpTokens: required", "HttpTokens: optional", "IMDSv2"),
    ],
)  # fmt: skip
def test_a_mistake_is_found(problems, tmp_path, before, after, found):
    text = FILE.read_text()
    assert before in text
    for name in ("requirements-torch.txt", "requirements.lock", "deploy/spot.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    path = tmp_path / "ray-cluster.yaml"
    path.write_text(text.replace(before, after))
    assert any(found in problem for problem in problems(path)), list(problems(path))
