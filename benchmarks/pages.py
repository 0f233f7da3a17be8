"""Pages of the documentation whose tables are made of results."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(page: str, tables: Mapping[str, str]) -> str:
    """A page with what stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` made anew.

    Raises:
        ValueError: it asks for a table there is none of.
    """

    def table(match: re.Match[str]) -> str:
        if match[1] not in tables:
            raise ValueError(f"The page asks for a table {match[1]!r}; there are {', '.join(map(repr, tables))}.")
        return f"<!-- table: {match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end of table -->"

    return re.sub(r"<!-- table: (.*?) -->\n.*?<!-- end of table -->", table, page, flags=re.DOTALL)
