"""The same step over several devices: a data mesh, a pmap entrance, and sharded trials."""
