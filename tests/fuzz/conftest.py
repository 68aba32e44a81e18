"""How many inputs and programs were tried, at the end of `make test-fuzz`."""

import jax
import pytest

from tests.counting import Counted

COUNTED = Counted("fuzz", "tried at random", "tests in which one crashed, was slow or wrong")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/fuzz/" in item.path.as_posix() and item.path.name != "test_code.py":
            item.add_marker(pytest.mark.fuzz)


@pytest.fixture
def tried(request):
    """Count what was tried: `tried("programs")`."""
    return COUNTED.counter(request)


@pytest.fixture(autouse=True)
def promotion():
    """Also without the compilation cache, which thousands of programs would fill."""
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_enable_compilation_cache", True)


def pytest_terminal_summary(terminalreporter):
    COUNTED.summarise(terminalreporter)
