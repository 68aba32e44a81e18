"""What the folders below share of arrays: dtypes, placement on devices, order of evaluation, decompositions."""
