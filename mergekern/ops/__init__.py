"""The public door of each op: check, allocate, select a backend, call it."""
