"""Reads a run folder and draws tables, plots and the HTML report; never runs anything."""
