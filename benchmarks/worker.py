"""The process that one method is measured in: ``python -m benchmarks.worker REQUEST RECORDS``, two files."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.measure import Request, measure


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    with Path(sys.argv[2]).open("a") as records:
        for record in measure(request):
            print(json.dumps(record), file=records, flush=True)


def as_json(request: Request) -> str:
    return json.dumps(dataclasses.asdict(request))


if __name__ == "__main__":
    main()
