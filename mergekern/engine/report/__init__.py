"""Reports of a merge: numbers of every slice, a page of figures, the model card."""

from __future__ import annotations
