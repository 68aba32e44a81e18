"""The run folder of a study."""
