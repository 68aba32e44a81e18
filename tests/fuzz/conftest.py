"""How many inputs and programs were tried, at the end of `make test-fuzz`."""

from collections import Counter

import jax
import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/fuzz/" in item.path.as_posix() and item.path.name != "test_code.py":
            item.add_marker(pytest.mark.fuzz)


@pytest.fixture
def tried(request):
    """Count what was tried: `tried("programs")`."""
    counts = Counter()

    def add(kind, number=1):
        counts[kind] += number
        request.node.user_properties[:] = [("fuzz", dict(counts))]

    return add


@pytest.fixture(autouse=True)
def promotion():
    """Also without the compilation cache, which thousands of programs would fill."""
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_enable_compilation_cache", True)


def pytest_terminal_summary(terminalreporter):
    counts, failed = Counter(), 0
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "fuzz" and report.when == "call":
                    counts.update(value)
                    failed += outcome == "failed"
    if counts:
        terminalreporter.section("tried at random")
        for kind, number in sorted(counts.items()):
            terminalreporter.line(f"{kind:44}{number:7}")
        terminalreporter.line(f"{'tests in which one crashed, was slow or wrong':44}{failed:7}")
