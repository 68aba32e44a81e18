"""Adapters on disk, apart from the base: orbax, fingerprints, PEFT interchange."""

from lorax_kit.checkpoint.adapter import Adapter, adapter_bytes, load_adapter, save_adapter
from lorax_kit.checkpoint.fingerprint import fingerprint
from lorax_kit.checkpoint.peft import load_peft, save_peft

__all__ = ["Adapter", "adapter_bytes", "fingerprint", "load_adapter", "load_peft", "save_adapter", "save_peft"]
