"""What a user writes: patterns, and the setting of a method for each."""
