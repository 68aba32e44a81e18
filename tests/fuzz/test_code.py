"""Nothing in the package runs what a file says: a check of its source, in `make test`."""

import re
from pathlib import Path

import pytest

import lorax_kit

PACKAGE = Path(lorax_kit.__file__).parent
RUNS = re.compile(
    r"\bpickle\.loads?\(|\bcloudpickle\b|\bdill\b|\bmarshal\.loads?\(|\bshelve\b|\bjoblib\b"
    r"|(?<![\w.])(?:eval|exec)\(|\byaml\.(?!safe_)\w*load|allow_pickle\s*=\s*True|\btorch\.load\("
)
ALLOWED = {"checkpoint/agreed.py": "what one process of a program sends to the others of the same program"}


@pytest.mark.parametrize("line", ["pickle.load(f)", "eval(x)", "np.load(f, allow_pickle=True)", "yaml.load(f)"])
def test_the_check_knows_what_runs_code(line):
    assert RUNS.search(line)
    assert not RUNS.search("model.eval() retrieval(x) np.load(f, allow_pickle=False) yaml.safe_load(f)")


def test_no_file_of_the_package_runs_what_it_reads():
    runs = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if RUNS.search(p.read_text())}
    assert runs == set(ALLOWED)


def test_every_np_load_refuses_pickles():
    calls = [m for p in PACKAGE.rglob("*.py") for m in re.findall(r"\bnp\.load\([^\n]*", p.read_text())]
    assert calls
    assert all("allow_pickle=False" in call for call in calls)
