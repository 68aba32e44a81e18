"""How many faults were injected, by kind, at the end of `make test-faults`."""

from collections import Counter

import jax
import pytest

from tests.faults import made


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/faults/" in item.path.as_posix():
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def injected(request):
    """Count faults: `injected("bit flipped")`."""
    counts = Counter()

    def add(kind, number=1):
        counts[kind] += number
        request.node.user_properties[:] = [("faults", dict(counts))]

    return add


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
    counts, failed = Counter(), 0
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "faults" and report.when == "call":
                    counts.update(value)
                    failed += outcome == "failed"
    if counts:
        terminalreporter.section("faults injected")
        for kind, number in sorted(counts.items()):
            terminalreporter.line(f"{kind:44}{number:6}")
        terminalreporter.line(f"{'all':44}{counts.total():6}, {failed} tests of them failed")
