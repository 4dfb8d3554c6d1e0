"""What pytest makes importable, the helpers of tests and benches, for `python -m bench.<name>`."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(_ROOT / folder) for folder in ("bench", "tests", "tests/real")]
