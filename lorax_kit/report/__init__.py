"""Reads a run folder and draws tables, plots and the HTML report; never runs anything."""

from lorax_kit.report.pages.run import write_report
from lorax_kit.report.run_folder import RunFolder, RunFolderError, read_run
from lorax_kit.report.tables.summary import summary_table
from lorax_kit.report.tables.trials import write_csv

__all__ = ["RunFolder", "RunFolderError", "read_run", "summary_table", "write_csv", "write_report"]
