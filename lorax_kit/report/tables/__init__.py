"""Tables of a run: trials (results.csv), the summary by condition, methods side by side, LaTeX; and numbers as text."""
