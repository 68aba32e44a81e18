"""The command line: `lorax-kit train|study|report|evaluate|predict|generate|compress|export|inspect|merge|...`.

Facts go to standard output (JSON with --json), progress and errors to standard error. Bad input exits with 2 and one
clear message, an interruption with 130, a reader that closes what it reads with 1, another process lost with 75.
"""

from lorax_kit.extras import need

try:
    need("cli", "click")
except ImportError as e:
    raise SystemExit(f"Error: {e}") from None

from lorax_kit.cli import (  # each registers its commands
    adapters,
    bench,
    compression,
    export,
    studies,
)
from lorax_kit.cli.root import cli, main

__all__ = ["adapters", "bench", "cli", "compression", "export", "main", "studies"]
