"""Real data sets, batching and metrics; nothing here knows about low-rank adaptation."""
