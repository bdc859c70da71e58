"""MLflow databases of these tests are copies of one."""

import pytest

from tests.support.stores import copied_from_a_template


@pytest.fixture(scope="session", autouse=True)
def quick_stores(tmp_path_factory):
    """Let this process make new databases of MLflow within milliseconds."""
    with copied_from_a_template(tmp_path_factory.mktemp("mlflow") / "template.db"):
        yield
