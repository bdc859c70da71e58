"""What a registered version may consist of: its files, and where MLflow's loader finds code."""

import pytest
import yaml

from gfl_platform.registry.artifacts import find_faults

MODEL = {
    "flavors": {
        "python_function": {
            "artifacts": {"checkpoint": {"path": "artifacts/checkpoint", "uri": "/tmp/x"}},
            "cloudpickle_version": "3.1.3",
            "code": "code",
            "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            "loader_module": "mlflow.pyfunc.loaders.code_model",
            "model_code_path": "/home/somebody/gfl_platform/registry/pyfunc.py",
            "python_version": "3.11.7",
            "streamable": False,
        }
    },
    "mlflow_version": "3.17.2",
}

FILES = (
    "conda.yaml",
    "python_env.yaml",
    "requirements.txt",
    "pyfunc.py",
    "code/gfl/__init__.py",
    "code/gfl_platform/sweeps/analysis/report.html.jinja",
    "artifacts/checkpoint/weights.safetensors",
    "artifacts/checkpoint/config.yaml",
    "artifacts/checkpoint/about.json",
    "artifacts/checkpoint/sha256.json",
)


@pytest.fixture
def folder(tmp_path):
    """A version as a registration writes it."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    write(tmp_path, MODEL)
    return tmp_path


def write(folder, content):
    (folder / "MLmodel").write_text(yaml.safe_dump(content))


def test_what_a_registration_writes_is_allowed(folder):
    assert find_faults(folder) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.dat",
        "python_model",
        "code/extra.pkl",
        "code/gfl/fast.so",
        "code/torch/__init__.py",
        "artifacts/checkpoint/training.pt",
        "artifacts/checkpoint/weights",
        "artifacts/other/weights.safetensors",
    ],
)
def test_any_other_file_is_named(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    (fault,) = find_faults(folder)
    assert fault.startswith(f"Artifact {name} is none of those that a registration writes")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"loader_module": "mlflow.pyfunc.model"}, "loader_module is 'mlflow.pyfunc.model'"),
        ({"python_model": "pyfunc.py"}, "python_model is 'pyfunc.py'"),
        ({"model_code_path": "code/gfl/__init__.py"}, "model_code_path is '__init__.py'"),
        ({"data": "artifacts"}, "data is 'artifacts'"),
        ({"code": "artifacts"}, "code is 'artifacts'"),
        ({"artifacts": {"checkpoint": {"path": "../elsewhere"}}}, "artifacts is {'checkpoint'"),
        ({"artifacts": {"checkpoint": None}}, "artifacts is {'checkpoint': None}"),
        ({"artifacts": None}, "artifacts is None"),
    ],
)
def test_another_loader_is_named(folder, changed, fault):
    settings = MODEL["flavors"]["python_function"] | changed
    write(folder, {"flavors": {"python_function": settings}})
    (found,) = find_faults(folder)
    assert found.startswith(f"MLmodel: {fault}")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"flavors": {"sklearn": {}}}, "has the flavors ['sklearn']"),
        ({"flavors": MODEL["flavors"] | {"sklearn": {}}}, "has the flavors ['python_function', "),
        ({"flavors": {}}, "cannot be read (ValueError)"),
        ("text", "cannot be read (TypeError)"),
        ({}, "cannot be read (KeyError)"),
    ],
)
def test_an_mlmodel_file_of_another_form_is_a_fault(folder, content, fault):
    write(folder, content)
    assert find_faults(folder)[0].startswith(f"MLmodel: {fault}")
