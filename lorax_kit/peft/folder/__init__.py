"""The two files of a PEFT folder."""
