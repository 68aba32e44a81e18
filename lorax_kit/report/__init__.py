"""Reads run folders and draws tables, plots and HTML reports; never runs anything."""

from typing import TYPE_CHECKING

from lorax_kit.extras import importing

if TYPE_CHECKING:
    from lorax_kit.report.pages.run import write_report
    from lorax_kit.report.pages.together import write_side_by_side
    from lorax_kit.report.run_folder import RunFolder, RunFolderError, read_run
    from lorax_kit.report.tables.summary import summary_table
    from lorax_kit.report.tables.trials import write_csv

__all__ = [
    "RunFolder",
    "RunFolderError",
    "read_run",
    "summary_table",
    "write_csv",
    "write_report",
    "write_side_by_side",
]
__getattr__, __dir__ = importing(
    __name__,
    {
        "RunFolder": "run_folder",
        "RunFolderError": "run_folder",
        "read_run": "run_folder",
        "summary_table": "tables.summary",
        "write_csv": "tables.trials",
        "write_report": "pages.run",
        "write_side_by_side": "pages.together",
    },
)
