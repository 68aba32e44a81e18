"""Specs, plans and factor trees: what is adapted, and the exact split and merge of parameters."""
