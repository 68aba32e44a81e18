"""What seeds can tell: intervals, paired tests, and conditions compared."""
