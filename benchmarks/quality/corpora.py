"""Text that every machine with PyTorch has, as bytes, split by file.

=============  =====================================================================================================
name           files
=============  =====================================================================================================
"python"       Python source of PyTorch and of the standard library: what models are pretrained on
"libraries"    Python source of small libraries that PyTorch depends on: a slight shift, more of the same
"sympy"        Python source of SymPy, which PyTorch depends on: a mild shift, the same language in another field
"headers"      C++ headers of PyTorch: a strong shift, another language
=============  =====================================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

#: One file in so many is held out.
_HELD_OUT_SHARE = 10
#: Between files.
_END = b"\x00"
_PACKAGE = Path(torch.__file__).parent


def _folders(*packages: str) -> tuple[Path, ...]:
    """Where packages are, without importing them.

    Raises:
        ModuleNotFoundError: one is not installed; a corpus without it would be another one.
    """
    folders = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"The package {package}, whose source is part of a corpus, is not installed.")
        folders.append(Path(spec.origin).parent)
    return tuple(folders)


#: By name: folders, and the suffixes of the files to read there.
_SOURCES: dict[str, tuple[tuple[Path, ...], tuple[str, ...]]] = {
    "python": ((_PACKAGE, Path(sysconfig.get_path("stdlib"))), (".py",)),
    "libraries": (_folders("networkx", "mpmath", "jinja2", "fsspec"), (".py",)),
    "sympy": (_folders("sympy"), (".py",)),
    "headers": ((_PACKAGE / "include",), (".h", ".hpp", ".cuh")),
}
NAMES = tuple(_SOURCES)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes of a corpus' files, one after the other.

    Attributes:
        name: one of ``NAMES``.
        train: bytes to train on, uint8, shape (bytes,).
        held_out: bytes of other files.
        files: how many files were read.
        digest: of all bytes: two machines with the same releases have the same corpus.
    """

    name: str
    train: Tensor
    held_out: Tensor
    files: int
    digest: str


def read(name: str, *, megabytes: float = 12.0) -> Corpus:
    """A corpus, or as much of it as ``megabytes``; files come in an order of their own that does not depend on folders.

    No file is in both parts, nor a copy of one: files that differ in white space only count once.

    Raises:
        FileNotFoundError: there are no such files on this machine.
    """
    seen: set[bytes] = set()
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    size, files = 0, 0
    for key, path in sorted(_files(name)):
        text = path.read_bytes()
        content = hashlib.blake2b(b"".join(text.split())).digest()
        if content in seen or not text.strip():
            continue
        seen.add(content)
        parts[int.from_bytes(key[:4], "big") % _HELD_OUT_SHARE == 0].append(text + _END)
        files += 1
        size += len(text)
        if size > megabytes * 1e6:
            break
    if not parts[False] or not parts[True]:
        raise FileNotFoundError(
            f"Found {files} files of the corpus {name!r} below {', '.join(map(str, _SOURCES[name][0]))}, too few to split. "
            "Install PyTorch and what it depends on from their wheels, which hold these files."
        )
    train, held_out = b"".join(parts[False]), b"".join(parts[True])
    digest = hashlib.blake2b(train + held_out, digest_size=8).hexdigest()
    return Corpus(name, _tensor(train), _tensor(held_out), files, digest)


def _files(name: str) -> Iterator[tuple[bytes, Path]]:
    """Files with a key each that orders them and decides which are held out: a digest of the path below its folder."""
    folders, suffixes = _SOURCES[name]
    for folder in folders:
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if path.suffix in suffixes and path.is_file() and "site-packages" not in inside.parts:
                yield hashlib.blake2b(inside.as_posix().encode()).digest(), path


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Batches:
    """Windows of a text in random order, none twice before all were used once.

    Args:
        text: uint8, shape (bytes,).
        tokens: length of a window; batches have one token more, the last target.
        batch: windows in a batch.
        seed: of the order, which is another one in each epoch.
        windows: use so many windows only, for a data set that is small.
    """

    def __init__(self, text: Tensor, tokens: int, batch: int, seed: int, windows: int | None = None) -> None:
        available = (len(text) - 1) // tokens
        self.windows = available if windows is None else min(windows, available)
        if self.windows < batch:
            raise ValueError(f"The text has {self.windows} windows of {tokens} bytes, too few for a batch of {batch}.")
        # A small set is spread over the whole text.
        self._starts = torch.linspace(0, available - 1, self.windows).long() * tokens
        self._text, self._tokens, self._batch, self._seed = text, tokens, batch, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def steps_per_epoch(self) -> int:
        return self.windows // self._batch

    def __getitem__(self, step: int) -> Tensor:
        """The batch of a step, int64, shape (batch, tokens + 1)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.windows, generator=generator)
        starts = self._starts[self._order[position * self._batch : (position + 1) * self._batch]]
        return self._text[starts[:, None] + torch.arange(self._tokens + 1)].long()
