"""The benchmarks' modules can be imported, as when a benchmark runs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
