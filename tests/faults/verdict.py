"""What must hold after every fault."""

import time

import lorax_kit as lk
from lorax_kit.report.run_folder import RunFolderError

OURS = (lk.LoraxError, RunFolderError)


def in_words(error, *names):
    """An error names what failed in at most four lines, and is none of another library's."""
    text = str(error)
    assert isinstance(error, OURS), repr(error)
    assert 0 < len(text.splitlines()) <= 4, text
    assert any(str(name) in text for name in names), text
    return True


def left_over(folder):
    """Names of what a save left beside its results, a moment later: threads of orbax may still write."""
    for _ in range(20):
        if not _staging(folder):
            return []
        time.sleep(0.1)
    return _staging(folder)


def _staging(folder):
    return sorted(p.name for p in folder.rglob("*") if ".staged" in p.name or p.name.endswith(".tmp"))


def outcome(read, *names):
    """(whether an error says so, what was read)."""
    try:
        return False, read()
    except Exception as e:
        return in_words(e, *names), None
