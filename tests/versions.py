"""Run the core tests with several releases of PyTorch and print a Markdown table: ``python -m tests.versions``.

Each release gets a virtual environment in a temporary directory, unless ``--python`` names an interpreter that has it. This
takes long and downloads PyTorch, so continuous integration does not run it; docs/compatibility.md has its last result.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASES = ("2.11", "2.13", "2.15")
#: What leans on private parts of PyTorch.
CORE = (
    *("prune", "compiling", "training", "checkpointing", "per_layer", "other_libraries", "calibration", "policy"),
    "private_hooks",
)


def make_interpreter(release: str, folder: Path) -> Path:
    """A new virtual environment with that release and what the tests need."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={release}.*", "--editable", f"{ROOT}[test]"], check=True)
    return python


def run_tests(python: Path, tests: Sequence[str], options: Sequence[str]) -> tuple[str, dict[str, int], float, str]:
    """The exact release, how many tests ended how, seconds, and the last lines of what was printed."""
    version = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    text = done.stdout + done.stderr
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) ([a-z]+)", lines[-1] if lines else "")}
    return version, counts, time.perf_counter() - started, "\n".join(text.splitlines()[-15:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=RELEASES, metavar="RELEASE", help="such as 2.13")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="RELEASE=PATH", help="interpreters that exist already"
    )
    parser.add_argument("--tests", nargs="+", default=CORE, metavar="NAME", help=f"of {', '.join(CORE)}, or others")
    parser.add_argument("--pytest", default="", help="further options of pytest, in one string")
    options = parser.parse_args(arguments)
    existing = dict(item.split("=", 1) for item in options.python)
    tests = [f"tests/test_{name}.py" for name in options.tests]
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for release in options.torch:
            python = (
                Path(existing[release]) if release in existing else make_interpreter(release, Path(folder, release))
            )
            version, counts, seconds, tail = run_tests(python, tests, options.pytest.split())
            bad = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
            rows.append(
                f"| {version} | {counts.get('passed', 0)} | {bad} | {counts.get('skipped', 0)} | {seconds / 60:.1f} |"
            )
            if bad or not counts.get("passed"):
                failed = True
                print(f"torch {version}:\n{tail}\n", file=sys.stderr)
    print("| torch | passed | failed | skipped | minutes |\n|---|---|---|---|---|")
    print("\n".join(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
