"""Metrics as pure functions, one a file; `diffaccel.eval.metrics.samples` says what they accept."""
