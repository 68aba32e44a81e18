"""Evaluates a jaxpr in which some values are `Weight`s: registry of rules, schedule of equations, evaluation.

`blocks` cuts a program for the backward pass, `recompute` runs a block again there from what its `Tape` kept.
"""
