"""Measures what `import peft_esft` adds to `import peft`: fresh processes, the two taking turns.

python tools/measure_import.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median


PEFT = "import time; start = time.perf_counter(); import peft; print(time.perf_counter() - start)"
BOTH = "import time; start = time.perf_counter(); import peft, peft_esft; print(time.perf_counter() - start)"
ADDED = "import time, peft; start = time.perf_counter(); import peft_esft; print(time.perf_counter() - start)"


def seconds(code: str) -> float:
    """What a new interpreter prints."""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    ways = {"import peft": PEFT, "import peft, peft_esft": BOTH, "import peft_esft, peft being there": ADDED}
    for code in ways.values():
        seconds(code)  # files read from the disk, bytecode written
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, code in ways.items():
            times[way].append(1e3 * seconds(code))
    for way, found in times.items():
        print(f"{way}: {min(found):.0f} ms at least, {median(found):.0f} ms in the median")
    alone, both, _ = times.values()
    print(f"added: {min(both) - min(alone):.0f} ms of minima, {median(both) - median(alone):.0f} ms of medians")


if __name__ == "__main__":
    main()
