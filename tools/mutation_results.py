"""Prints what `mutmut run` found, as tests/mutation.md has it: a table of the files, and every mutant that survived.

    python tools/mutation_results.py

Fails if a mutant survived that tests/mutation.md does not name: its test is missing, or the reason why there is none.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files


NOTES = Path("tests/mutation.md")
KILLED = ("killed", "timeout", "segfault")


def change_of(mutant: str, path: Path) -> str:
    """The mutant's function, and its lines that differ, before and after."""
    # peft_esft.ops.deltas.x__private__mutmut_1 or peft_esft.tuner.layers.layer.xǁClassǁmethod__mutmut_1
    function = mutant.rpartition(".x")[2].rpartition("__mutmut_")[0][1:].replace("ǁ", ".")
    lines = [line for line in get_diff_for_mutant(mutant, path=path).splitlines() if line[:3] not in ("---", "+++")]
    before, after = (" ".join(line[1:].strip() for line in lines if line[:1] == sign) for sign in "-+")
    return f"| `{function}` | `{before}` | `{after}` |"


def main() -> None:
    """Reads `mutants/`, which `mutmut run` wrote."""
    survivors, unknown = [], 0
    print("| file | mutants | killed | survived | |\n|---|---|---|---|---|")
    order = {Path(name): place for place, name in enumerate(config().only_mutate)}
    for path in sorted(walk_mutatable_files(), key=order.__getitem__):
        data = SourceFileMutationData(path=path)
        data.load()
        status = {mutant: status_by_exit_code[code] for mutant, code in data.exit_code_by_key.items()}
        counts = Counter("killed" if value in KILLED else value for value in status.values())
        total, killed = sum(counts.values()) - counts["not checked"], counts["killed"]
        if total:
            print(f"| `{path.name}` | {total} | {killed} | {total - killed} | {1 - killed / total:.1%} |")
        survivors += [(path, m) for m, value in status.items() if value not in (*KILLED, "not checked")]
    notes = NOTES.read_text() if NOTES.exists() else ""
    print("\n| function | code | mutant |\n|---|---|---|")
    for path, mutant in survivors:
        change = change_of(mutant, path)
        is_known = change in notes
        unknown += not is_known
        print(change + ("" if is_known else " new"))
    sys.exit(f"{unknown} survivors are not in {NOTES}" if unknown else 0)


if __name__ == "__main__":
    main()
