"""Models for runtimes that know nothing of the project: called once a batch, or token by token."""
