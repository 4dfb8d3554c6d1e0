"""Spaces of features, statistics, matching, merging and repair of whole networks."""
