"""Measures what `import peft_esft` adds to `import peft`, each time in a fresh process.

python tools/measure_import.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median


CODE = """
import time
start = time.perf_counter()
import peft
there = time.perf_counter()
import peft_esft
print(there - start, time.perf_counter() - there)
"""


def milliseconds() -> tuple[float, float]:
    """What a new interpreter takes for PEFT, and then for peft_esft."""
    printed = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    peft, added = (1e3 * float(seconds) for seconds in printed.split())
    return peft, added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    milliseconds()  # files are read from the disk, bytecode is written
    times = zip(*(milliseconds() for _ in range(rounds)), strict=True)
    for name, found in zip(("import peft", "import peft_esft, in addition"), times, strict=True):
        print(f"{name}: {min(found):.0f} ms at least, {median(found):.0f} ms in the median")


if __name__ == "__main__":
    main()
