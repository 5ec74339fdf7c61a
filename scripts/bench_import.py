"""Print the seconds that ``import chanzoo`` adds to ``import timm``: the median of several fresh processes.

python scripts/bench_import.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

PROBE = """
import time
import timm
start = time.perf_counter()
import chanzoo
print(time.perf_counter() - start)
"""


def main() -> None:
    """Run the probes one after the other."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds = [float(subprocess.check_output([sys.executable, "-c", PROBE])) for _ in range(runs)]
    print(f"median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s, {runs} runs")


if __name__ == "__main__":
    main()
