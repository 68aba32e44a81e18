"""Adapters as Hugging Face PEFT folders, both ways: every method whose file says how PEFT keeps it."""

from lorax_kit.peft.load import load_peft
from lorax_kit.peft.save import save_peft

__all__ = ["load_peft", "save_peft"]
