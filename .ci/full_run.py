"""Tell whether the full test matrix must run, or take note that it did: ``full_run.py needed`` or ``full_run.py record``.

What families, adapters, process groups and the atlas could show depends on the sources below and on pinned versions. Their
digest at the last full run that passed is in ``.ci/full-run``; while it is what it was, CI runs the tests of ``make test``.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".ci" / "full-run"
#: Folders and files whose change calls for a full run.
SOURCES = ("dropbp_fx/_torch", "dropbp_fx/graph", "dropbp_fx/runtime", "dropbp_fx/sensitivity", "dropbp_fx/lowering.py")
SOURCES += ("dropbp_fx/entering.py", "dropbp_fx/captured.py", "dropbp_fx/state.py", "constraints.txt")


def digest() -> str:
    """The SHA-256 of the sources."""
    found = hashlib.sha256()
    for path in _files():
        found.update(f"{path.relative_to(ROOT).as_posix()}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _files() -> Iterator[Path]:
    for source in SOURCES:
        path = ROOT / source
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def main() -> int:
    """Exit with 0 if the full run is needed, with 1 if not."""
    match sys.argv[1:]:
        case ["needed"]:
            return int(RECORD.exists() and RECORD.read_text().split()[:1] == [digest()])
        case ["record"]:
            RECORD.write_text(f"{digest()}  sources of the last full run that passed (.ci/full_run.py)\n")
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
