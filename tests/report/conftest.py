"""Drawing is slow: the pages that several tests look at are written once."""

import pytest

from lorax_kit.report import write_report
from tests.report import fake_run


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """A finished run of 3 ranks x 3 rates x 5 seeds with a probe and diverged trials, and its report."""
    run = fake_run.build(
        tmp_path_factory.mktemp("grid") / "run",
        ranks=(1, 4, 8),
        rates=(3e-4, 1e-3, 3e-3),
        seeds=5,
        steps=50,
        sites=fake_run.SITES[:3],
        diverged=lambda t: t["lr"] == 3e-3 and t["rank"] == 8 and t["seed"] < 2,
    )
    write_report(run)
    return run


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A run whose names try to break out of the page, and its report."""
    name = "<script>alert(1)</script>\"'&]]>--> $x_1$"
    return write_report(
        fake_run.build(
            tmp_path_factory.mktemp("hostile") / "run",
            ranks=(1, 2),
            rates=(1e-3, 1e-2),
            seeds=2,
            steps=2,
            targets=("attention", "all"),
            sites=[f"{name}/{k}" for k in range(2)],
            change=lambda t: {"targets": f"{name} {t['targets']}", "variant": name, "trial": f"{name} {t['trial']}"},
            study={
                "name": name,
                "command": name,
                "task": {"name": name, name: name},
                "environment": {name: name},
                "design": {name: name},
                "spec": {name: [name]},
            },
        )
    )
