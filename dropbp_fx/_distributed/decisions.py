"""What the first rank decides of what every rank has posted: an error on all ranks, or on none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
#: A disagreement found in passing is an error this many steps later, so that no rank has run on past that point: hosts of
#: ranks that exchange gradients in every step are never further apart.
_STEPS_APART = 10
_RANKS_NAMED = 8


def refused(posts: Sequence[Message]) -> Message | None:
    """An error if a rank has failed, or if ranks are at different places of their program."""
    for post in posts:
        if "failure" in post:
            return failed(post["rank"], post["what"], post["failure"])
    if len({post["what"] for post in posts}) > 1:
        places = _by_value([(post["rank"], post["what"]) for post in posts])
        return {
            "error": f"The ranks do not run the same program: {places}. Every rank must do both, in the same order."
        }
    return None


def failed(rank: int, what: str, failure: str) -> Message:
    return {"error": f"Rank {rank} failed in {what}, so no rank can go on: {failure}"}


def agreed(posts: Sequence[Message]) -> Message:
    error = _difference([{**post, "facts": {"seed": post["seed"], **post["facts"]}} for post in posts])
    if error is not None:
        return {"error": error}
    first = posts[0]
    return {"seed": first["initial_seed"] if first["seed"] is None else first["seed"], "flops": first["flops"]}


def checked(posts: Sequence[Message]) -> Message:
    error = _difference(posts)
    return {} if error is None else {"error": error}


def compared(posts: Sequence[Message]) -> Message:
    error = _difference(posts)
    return {} if error is None else {"error": error, "at": max(post["now"] for post in posts) + _STEPS_APART}


def averaged(posts: Sequence[Message]) -> Message:
    error = _difference([{"rank": p["rank"], "facts": {k: p[k] for k in ("names", "metric")}} for p in posts])
    if error is not None:
        return {"error": error}
    columns = zip(*(post["values"] for post in posts), strict=True)
    values = [math.fsum(column) / len(posts) for column in columns]
    return {"values": values, "batches": sum(post["batches"] for post in posts)}


def _difference(posts: Sequence[Message]) -> str | None:
    """A sentence on the facts that differ, ``None`` if none do."""
    names = dict.fromkeys(name for post in posts for name in post["facts"])
    found = []
    for name in names:
        values = [(post["rank"], post["facts"].get(name)) for post in posts]
        if all(value == values[0][1] for _, value in values):
            continue
        if all(isinstance(value, list) for _, value in values):
            name, values = _first_difference(name, values)
        found.append(f"{name}: {_by_value(values)}")
    if not found:
        return None
    return (
        f"The ranks would not drop the same branches. They differ in {'; '.join(found)}. Give dropbp_backend() the same "
        "arguments on every rank, set rate, rates and progress alike, load the same state, and run as many training "
        "forwards on one rank as on any other (those in backend.disabled(), in evaluation mode or without gradients do not "
        "count). Ranks that hold other parts of the model, such as pipeline stages, agree among their copies only: "
        "dropbp_fx.distributed.agree_across(backend, group)."
    )


def _first_difference(name: str, values: Sequence[tuple[int, list[Any]]]) -> tuple[str, list[tuple[int, Any]]]:
    lengths = {len(value) for _, value in values}
    if len(lengths) > 1:
        return f"the number of {name}", [(rank, len(value)) for rank, value in values]
    at = next(k for k in range(lengths.pop()) if len({json.dumps(value[k]) for _, value in values}) > 1)
    return f"number {at} of the {name}", [(rank, value[at]) for rank, value in values]


def _by_value(values: Sequence[tuple[int, Any]]) -> str:
    """Each value with the ranks that have it: ``0 on ranks 0 and 2, 1 on rank 1``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values:
        ranks.setdefault(value if isinstance(value, str) else json.dumps(value), []).append(rank)
    return ", ".join(f"{value} on {ranks_in_words(those)}" for value, those in ranks.items())


def ranks_in_words(ranks: Sequence[int]) -> str:
    named = [str(rank) for rank in ranks[:_RANKS_NAMED]]
    if len(ranks) > _RANKS_NAMED:
        return f"ranks {', '.join(named)} and {len(ranks) - _RANKS_NAMED} more"
    return f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(named[:-1])} and {named[-1]}"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
