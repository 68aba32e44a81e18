"""Counts of what a kind of test tried, which its run sums up at the end."""

from collections import Counter
from typing import NamedTuple


class Counted(NamedTuple):
    """A marker whose tests count.

    Args:
      marker: of pytest.
      title, failed: what the summary calls the counts, and the tests that failed.
    """

    marker: str
    title: str
    failed: str

    def counter(self, request):
        """Of one test: `add("bit flipped")`."""
        counts = Counter()

        def add(kind, number=1):
            counts[kind] += number
            request.node.user_properties[:] = [(self.marker, dict(counts))]

        return add

    def summarise(self, terminalreporter):
        """Write the sums of all tests, where there are any."""
        counts, failed = Counter(), 0
        for outcome in ("passed", "failed"):
            for report in terminalreporter.stats.get(outcome, []):
                for name, value in getattr(report, "user_properties", ()):
                    if name == self.marker and report.when == "call":
                        counts.update(value)
                        failed += outcome == "failed"
        if counts:
            terminalreporter.section(self.title)
            for kind, number in sorted({**counts, self.failed: failed}.items()):
                terminalreporter.line(f"{kind:44}{number:7}")
