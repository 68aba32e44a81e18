"""The command line: `lorax-kit study|train|evaluate|convert|combine|merge|compress|export|inspect|report|bench`.

Facts go to standard output (JSON with --json), progress and errors to standard error. Bad input exits with 2 and one
clear message, an interruption with 130.
"""

from lorax_kit.cli import adapters, bench, compression, exchange, export, studies  # each registers its commands
from lorax_kit.cli.root import cli, main

__all__ = ["adapters", "bench", "cli", "compression", "exchange", "export", "main", "studies"]
