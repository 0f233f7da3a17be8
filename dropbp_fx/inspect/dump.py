"""``dump_graphs``: write every graph on the way from Dynamo to the inner compiler as a readable file."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from dropbp_fx.runtime import artifacts


@contextlib.contextmanager
def dump_graphs(directory: str | Path) -> Iterator[Path]:
    """Write the graphs of everything that is compiled within the block, in this thread, to files.

    Usage::

        with dropbp_fx.dump_graphs("graphs"):
            compiled(batch).backward()
            backend.warmup()  # for the variants that the first pattern does not need

    For the n-th graph from Dynamo there is a folder ``graph<n>`` with

    * ``dynamo.py``: the graph with its gates;
    * ``regions.txt``: the regions, the branches of each, and whose code each shares;
    * for each region with code of its own a folder ``region<m>_<branches>`` that holds ``region.py``, ``joint.py`` (the
      joint forward/backward graph, gates in place) and for each variant a folder with ``joint.py`` (pruned),
      ``forward.py`` and ``backward.py``.

    It works for every inner compiler: the graphs are traced once more for the files, as the inner compiler gets them.
    Files that are there already are not overwritten; a second version gets a number.

    Args:
        directory: made if it does not exist.

    Yields:
        The directory.

    Raises:
        NotADirectoryError: ``directory`` is a file.
    """
    root = Path(directory)
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(
            f"dump_graphs() writes to a directory, and {str(root)!r} is a file. Give another name."
        )
    root.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def write(name: str, text: str) -> None:
        path = root / name
        with lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            number = 1
            while path.exists():
                if path.read_text(encoding="utf-8") == text:
                    return
                number += 1
                path = (root / name).with_stem(f"{Path(name).stem}_{number}")
            path.write_text(text, encoding="utf-8")

    with artifacts.listening(write):
        yield root
