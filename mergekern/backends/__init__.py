"""One file per backend; the same function names and destination-first signatures in each."""
