"""One command that measures the toolkit on an accelerator: rows of JSON, within a budget of seconds."""

from lorax_kit.benchmarks.device.machine import check_accelerator
from lorax_kit.benchmarks.device.rows import device_rows
from lorax_kit.benchmarks.device.run import Row, run_rows, share_memory, shown

__all__ = ["Row", "check_accelerator", "device_rows", "run_rows", "share_memory", "shown"]
