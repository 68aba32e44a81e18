"""Models that read one text and write another: T5 and Marian."""
