"""Benchmarks: one file per op, one per whole job; `python -m bench.report` prints the table."""
