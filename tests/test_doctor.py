"""`lorax-kit doctor`: facts as JSON, each problem with what mends it, and exit codes."""

import json
import os
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from lorax_kit import extras, measure
from lorax_kit.cli import main
from lorax_kit.doctor import examine, machine, self_test, settings, versions
from lorax_kit.doctor.text import as_text

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


@pytest.fixture
def untried(monkeypatch):
    """No self-test, which takes seconds."""
    monkeypatch.setattr(self_test, "CHECKS", ())


def mends(found):
    return {problem["what"]: (problem["mend"], problem["fatal"]) for problem in found["problems"]}


def failed(capsys, *argv):
    """What a call prints that exits with 1."""
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *argv])
    assert stopped.value.code == 1
    return capsys.readouterr().out


def test_every_promise_holds_here(capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"ok", "environment", "devices", "checks", "problems"}
    assert found["ok"]
    assert [check["name"] for check in found["checks"]] == [name for name, *_ in self_test.CHECKS]
    for check in found["checks"]:
        assert check["ok"], check
        assert set(check) == {"name", "ok", "seconds", "detail"}
    assert sum(row["count"] for row in found["devices"]) == 4
    environment = found["environment"]
    assert environment["backend"] == "cpu"
    assert environment["packages"]["jaxlib"]["ok"]
    assert environment["memory_bytes"]["total"] >= environment["memory_bytes"]["available"] > 0
    assert environment["run_folder"]["writable"]
    assert not any(problem["fatal"] for problem in found["problems"])


@pytest.mark.usefixtures("untried")
def test_settings_that_surprise_are_noted():
    found = examine()
    name = next(what for what in mends(found) if what.startswith("jax_numpy_dtype_promotion is 'strict'"))
    assert "jax.config.update('jax_numpy_dtype_promotion', 'standard')" in mends(found)[name][0]
    assert any(what.startswith("XLA_FLAGS") for what in mends(found))
    assert found["ok"]


def test_a_folder_that_was_removed_is_told(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a").rmdir()
    assert mends(examine())["the current folder was removed"][0] == "change to one that is there"


@pytest.mark.usefixtures("untried")
def test_a_version_out_of_range_is_told_with_what_mends_it(monkeypatch, capsys):
    true = extras.version
    monkeypatch.setattr(extras, "version", lambda name: "0.9.1" if name == "jax" else true(name))
    printed = failed(capsys)
    assert "wrong  jax: 0.9.1 (" in printed
    assert "wrong: jax is 0.9.1, and lorax_kit needs " in printed
    assert "pip install 'jax" in printed
    assert printed.endswith("not ready: mend what is wrong\n")


@pytest.mark.usefixtures("untried")
def test_a_jaxlib_that_does_not_fit_jax_is_told(monkeypatch, capsys):
    true = extras.version
    monkeypatch.setattr(extras, "version", lambda name: "0.9.0" if name == "jaxlib" else true(name))
    found = json.loads(failed(capsys, "--json"))
    assert any(what.startswith("jaxlib is 0.9.0, and jax needs ") for what in mends(found))


@pytest.mark.usefixtures("untried")
def test_missing_packages_and_extras(monkeypatch):
    true = extras.version

    def without(name):
        if name in ("tqdm", "gguf", "chex"):
            raise PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(extras, "version", without)
    found = examine()
    assert [p["what"] for p in found["problems"] if p["fatal"]] == ["tqdm is not installed, and lorax_kit needs >=4.67"]
    llama = found["environment"]["extras"]["llama"]
    assert llama == {"gives": "models in GGUF files", "installed": False, "missing": ["gguf"]}
    assert "without lorax_kit[llama], for models in GGUF files: no gguf" in as_text(found)


def test_a_failing_and_a_raising_check_are_told(monkeypatch, capsys):
    def raises():
        raise ZeroDivisionError("made up")

    checks = (("one", lambda: (False, "0.3 instead of 0.2"), "turn it"), ("two", raises, "leave it"))
    monkeypatch.setattr(self_test, "CHECKS", checks)
    found = json.loads(failed(capsys, "--json"))
    assert not found["ok"]
    assert [check["ok"] for check in found["checks"]] == [False, False]
    assert mends(found)["one: 0.3 instead of 0.2"] == ("turn it", True)
    assert mends(found)["two: ZeroDivisionError: made up"] == ("leave it", True)


def test_a_base_that_changes_fails_its_check(monkeypatch):
    given = self_test.toy()
    changed = {name: {"kernel": leaf["kernel"] + 1} for name, leaf in given.base.items()}
    trained = self_test.Trained(given.factors, [1, 0, 1, 0])
    monkeypatch.setattr(self_test, "first_training", lambda: (given, changed, trained))
    assert self_test.base_stays() == (False, "base changed, factors unmoved")
    assert self_test.one_compilation() == (False, "compilations of 4 steps: 1, 0, 1, 0")


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("error", "says"), [(RuntimeError("No backend 'cuda'"), "No backend 'cuda'"), (AssertionError(), "AssertionError")]
)
def test_a_backend_that_cannot_start_is_told(monkeypatch, error, says):
    def devices():
        raise error

    monkeypatch.setattr(machine.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    found = examine()
    assert (found["ok"], found["devices"], found["checks"]) == (False, [], [])
    mend, fatal = mends(found)[f"JAX cannot start its backend: {says}"]
    assert fatal
    assert mend.startswith("unset JAX_PLATFORMS, which is 'cuda'")


@pytest.mark.parametrize(("platforms", "mend"), [("cpu", "unset JAX_PLATFORMS, which is 'cpu'"), ("", "pip it")])
def test_an_accelerator_that_jax_does_not_use_is_told(monkeypatch, tmp_path, platforms, mend):
    (tmp_path / "card0").touch()
    monkeypatch.setattr(machine, "ACCELERATORS", ((str(tmp_path), "card[0-9]*", "a card", "pip it"),))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    ((what, told, fatal),) = machine.devices()[1]
    assert what == "this machine has a card, and JAX runs on the processor alone"
    assert (told, fatal) == (mend, False)


def test_a_file_system_without_locks_or_space_is_told(monkeypatch, tmp_path):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.fcntl, "flock", no_locks)
    monkeypatch.setattr(machine, "LITTLE_SPACE", 2**80)
    facts, problems = machine.hardware()
    assert facts["run_folder"]["writable"]
    assert not facts["run_folder"]["locks"]
    assert ["has no locks" in problems[0].what, "MiB of free space" in problems[1].what] == [True, True]


def test_temporary_files_that_cannot_be_written_are_fatal(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    (problem,) = [p for p in machine.hardware()[1] if p.fatal]
    assert "TMPDIR" in problem.mend


def test_every_requirement_can_be_compared():
    for needed in versions.requirements("lorax_kit"):
        clauses = versions._CLAUSE.findall(needed.supported)
        assert ",".join("".join(clause) for clause in clauses) == needed.supported
    assert set(versions.EXTRAS) == set(PROJECT["optional-dependencies"])


@pytest.fixture
def unchosen(monkeypatch):
    for name in (*measure.CHOICES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))


@pytest.mark.usefixtures("unchosen")
def test_memory_taken_anew_is_noted_where_it_could_be_kept(monkeypatch):
    (noted,) = settings.memory_kept("cpu")
    assert noted.mend.endswith(f"export GLIBC_TUNABLES={measure.TUNABLES}")
    assert not noted.fatal
    assert settings.memory_kept("gpu") == []
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=2")
    assert settings.memory_kept("cpu")[0].mend.endswith(f"=glibc.rtld.nns=2:{measure.TUNABLES}")
    for name, value in (("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"), ("MALLOC_ARENA_MAX", "2")):
        with monkeypatch.context() as here:
            here.setenv(name, value)
            assert settings.memory_kept("cpu") == []
    for libc in (("", ""), ("musl", "1.2")):
        monkeypatch.setattr("platform.libc_ver", lambda libc=libc: libc)
        assert settings.memory_kept("cpu") == []


FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from lorax_kit.measure import keep_memory
print(keep_memory() if sys.argv[1:] else None)
@jax.jit
def f(x):  # temporaries of 36 MB, more than glibc keeps of itself
    y = jax.lax.optimization_barrier(jnp.outer(x, x))
    return jax.lax.optimization_barrier(jnp.sin(y)).sum()
x = jnp.ones(3000)
for i in range(60):
    if i == 30:  # by then each place that small blocks have cut is replaced
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def page_faults(*args, **more):
    """What `keep_memory` returned, and page faults of thirty calls: of the allocator, whatever else computes."""
    env = {name: x for name, x in os.environ.items() if name not in (*measure.CHOICES, "GLIBC_TUNABLES")}
    ran = [sys.executable, "-c", FAULTS, *args]
    out = subprocess.run(ran, env=env | more, capture_output=True, text=True, timeout=120, check=True).stdout
    done, count = out.split()
    return done, int(count)


@of_glibc
def test_memory_that_is_kept_needs_no_fresh_pages():
    assert page_faults()[1] > 250_000
    done, count = page_faults("keep")
    assert (done, count < 80_000) == ("True", True)


@of_glibc
def test_memory_is_kept_by_the_environment_too():
    assert page_faults(GLIBC_TUNABLES=measure.TUNABLES)[1] < 80_000
    assert page_faults("keep", MALLOC_ARENA_MAX="4")[0] == "False"
