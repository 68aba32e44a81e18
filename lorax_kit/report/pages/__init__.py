"""The HTML pages of runs: each self-contained, readable without a network and on a phone."""
