"""Adapters on disk, apart from the base: orbax, fingerprints, staging."""

from lorax_kit.checkpoint.adapter import Adapter, adapter_bytes, load_adapter, save_adapter
from lorax_kit.checkpoint.fingerprint import fingerprint

__all__ = ["Adapter", "adapter_bytes", "fingerprint", "load_adapter", "save_adapter"]
