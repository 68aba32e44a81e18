"""Groups of trials under way: here one after the other, on workers, or as a race; and what they came to."""
