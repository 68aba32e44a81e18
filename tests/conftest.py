"""Four virtual CPU devices, strict promotion, and a compilation cache: compilation dominates the tests' time."""

import gc
import os
import signal
from importlib.metadata import version

# Tiny programs: compiling them is what tests cost, so LLVM does not optimise them (0.7x of the processor time),
# elementwise work is not emitted through MLIR (0.8x of what is left), and no program is cut into parts that threads
# compile (0.92x of that). XLA ends the process at a flag it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if version("jaxlib").startswith("0.10.")
        else ""
    ),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on tiny matrices its threads take more time than they save
# Two workers and the commands they start share even the smallest programs; JAX compresses them by zstandard where it
# is installed, else by zlib, which takes more time.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.path.dirname(__file__), "..", ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

from tests import slow

# Under nohup or in the background both are ignored, and the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
gc.set_threshold(100_000, 20, 100)  # tracing makes objects by the million, few of them garbage
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """What a file has compiled and traced is dropped before the next: collecting garbage among it all takes seconds."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def standard_promotion():
    """Optax's bias correction mixes a float with an int32 count; what we wrote is traced strictly all the same."""
    with jax.numpy_dtype_promotion("standard"):
        yield


LONG = ("test_cli.py", "test_table.py", "test_device.py", "test_export_called.py", "test_docs.py")


def pytest_collection_modifyitems(config, items):
    """Mark what takes long; files of long tests first, so that no worker is left with them (--no-loadscope-reorder)."""
    listed = slow.read()
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    gone = listed - {item.nodeid for item in items}
    if config.args == config.getini("testpaths") and gone:
        raise pytest.UsageError(f"tests/slow.txt names tests that are not there, first {min(gone)!r}")
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    gc.freeze()  # tests and modules are no garbage, and the benchmarks collect often


def pytest_terminal_summary(terminalreporter):
    """What the coverage tests and the contract table proved."""
    proved, cells = {}, {}
    for outcome in ("passed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):  # a file skipped as a whole has none
                if name == "coverage" and outcome == "passed":
                    proved.setdefault(tuple(value[:2]), set()).add(value[2])
                if name == "contract":
                    cells.setdefault(value[0], []).append(tuple(value[1:]))
    if cells:
        terminalreporter.section("contract table: methods and starts x models")
        for contract, rows in cells.items():
            held, ways, models = sum(applies for *_, applies in rows), {r[0] for r in rows}, {r[1] for r in rows}
            terminalreporter.line(
                f"{contract:10}{held:4} cells hold, {len(rows) - held} do not apply ({len(ways)} x {len(models)})"
            )
    if not proved:
        return
    contracts = ("merged", "jit", "grad", "vmap")
    terminalreporter.section("factored, and equal to the merged parameters")
    terminalreporter.line(f"{'primitive or module':24}{'frontend':12}" + "".join(f"{c:8}" for c in contracts))
    for (what, frontend), done in sorted(proved.items(), key=lambda pair: pair[0][::-1]):
        marks = "".join(f"{'yes' if c in done else '-':8}" for c in contracts)
        terminalreporter.line(f"{what:24}{frontend:12}{marks}")
