"""Adapters on disk, apart from the base: orbax, fingerprints, PEFT interchange."""
