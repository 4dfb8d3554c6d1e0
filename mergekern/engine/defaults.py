"""Defaults of a merge that the command line shows, in a file that loads no torch."""

from __future__ import annotations

DEFAULT_MEMORY = "4GiB"
DEFAULT_SHARD_SIZE = "5GB"
