"""Which features belong together."""
