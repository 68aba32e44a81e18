"""How many faults were injected, by kind, at the end of `make test-faults`."""

import jax
import pytest

from tests.counting import Counted
from tests.faults import made

COUNTED = Counted("faults", "faults injected", "tests of them that failed")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/faults/" in item.path.as_posix():
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def injected(request):
    """Count faults: `injected("bit flipped")`."""
    return COUNTED.counter(request)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def things(tmp_path_factory):
    """Of every kind that is written, one: name -> path."""
    with jax.numpy_dtype_promotion("standard"):
        return made.everything(tmp_path_factory.mktemp("things"))


def pytest_terminal_summary(terminalreporter):
    COUNTED.summarise(terminalreporter)
