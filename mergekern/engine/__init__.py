"""Merging checkpoints on disk: configuration, plan, stream, files."""
