"""Writing to disk: a path appears whole or not at all, one process writes at a time, and what fails says why."""
