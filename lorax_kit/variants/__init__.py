"""One file per low-rank method; importing this folder registers them in core's table."""
