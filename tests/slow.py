"""Tests that take long: `make test` leaves them out, `make test-slow` runs them. Their list is written by

    python -m pytest --junitxml=junit.xml -m "not interop and not faults and not distributed and not fuzz"
    python -m tests.slow junit.xml

Of each function the quickest case stays in `make test`, unless it takes long itself.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_name("slow.txt")
SECONDS, AT_MOST = 1.5, 6.0
"""What is long, and how long the quickest case of a function may take; on two shared cores."""
ALWAYS = ("tests/test_docs.py", "tests/test_guide.py", "tests/test_imports.py")
"""What a landing holds to: code that readers copy, and which room knows which."""


def read():
    """Node ids."""
    return frozenset(LIST.read_text(encoding="utf-8").splitlines())


def slow_of(junit):
    """Node ids of the tests that took long, by a report of pytest."""
    cases = defaultdict(list)
    for case in ElementTree.parse(junit).iter("testcase"):
        file, name = case.get("classname").replace(".", "/") + ".py", case.get("name")
        cases[file, name.partition("[")[0]].append((float(case.get("time")), f"{file}::{name}"))
    for found in cases.values():
        if next(iter(found))[1].startswith(ALWAYS):
            continue
        for place, (seconds, node) in enumerate(sorted(found)):
            if seconds >= SECONDS and (place or seconds >= AT_MOST):
                yield node


if __name__ == "__main__":
    LIST.write_text("".join(f"{node}\n" for node in sorted(slow_of(sys.argv[1]))), encoding="utf-8")
