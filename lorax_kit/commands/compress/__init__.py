"""`compress`: subjects, methods, one smaller model, and many compared."""
