"""A whole rank ablation as one compiled program: design, packing, engine, store, statistics."""
