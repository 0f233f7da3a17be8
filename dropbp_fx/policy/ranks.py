"""Let the processes of a distributed run agree on what decides patterns.

Patterns are a function of seed, round, rates and branches, so ranks that agree on these once need not talk at every step.
They talk where something comes in from outside: before the first draw, when branches turn up, after a state was loaded,
after a calibration. In between, a digest of all that decides patterns is compared once in so many rounds, and nobody waits
for it.

Everything goes through the process group's key-value store: a few hundred bytes between hosts that no stream of a device
waits for, that cannot get between two collectives of the training loop, and that has a time limit of its own. The first rank
of the group reads what every rank posts and writes down the decision, which is an error on all ranks or on none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dropbp_fx import _torch
from dropbp_fx.optimizer_steps import after_steps
from dropbp_fx.policy.sensitivity import Sensitivity
from dropbp_fx.policy.values import shown

Message = dict[str, Any]
#: A disagreement found in passing is an error this many steps later, so that no rank has run on past that point: hosts of
#: ranks whose gradients meet in every step are never further apart.
_STEPS_APART = 10
_RANKS_NAMED = 8


class RankDisagreementError(RuntimeError):
    """The ranks of a distributed run would not drop the same branches, or one of them did not come to say so."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What one rank brings to an agreement.

    Attributes:
        facts: what must be equal on all ranks, by a name that an error can use.
        seed: its seed, ``None`` where the user gave none.
        initial_seed: what stands in for it: the first rank's counts for all.
        flops: backward FLOPs by branch, which depend on the sequence lengths a rank has seen: the first rank's hold for all.
    """

    facts: Mapping[str, Any]
    seed: int | None
    initial_seed: int
    flops: Mapping[str, int]


def checked_group(group: Any) -> Any:
    """A process group that this rank is in, or ``None`` for the default one.

    Raises:
        TypeError: it is no process group.
        ValueError: it has no place for this rank.
    """
    if group is None:
        return None
    if not dist.is_available():
        raise ValueError(
            "This PyTorch was built without torch.distributed, so there is no process group to agree across."
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "This rank is not in the process group: new_group() returned GroupMember.NON_GROUP_MEMBER on it. Call "
            "agree_across(backend, group) on the ranks of the group alone, with the groups that hold them."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a process group of torch.distributed, or None for all ranks, not {shown(group)}. new_group() "
            "and the get_group() of a device mesh return one."
        )
    return group


class RankAgreement:
    """The agreement of one backend with its copies on the other ranks of a process group.

    Attributes:
        every: compare digests once in so many rounds; 0 for never.
        timeout_s: how long to wait for the other ranks.
    """

    def __init__(self) -> None:
        self.every = 100
        self.timeout_s = 600.0
        self._group: Any = None
        self._channel: _Channel | None = None
        self._comparing = False
        self._found: Message | None = None  # a disagreement that is not yet due to be raised
        self._steps = _Steps()

    def across(self, group: Any, *, every: int, timeout_s: float) -> None:
        """Agree with the ranks of ``group`` from now on, ``None`` being all ranks."""
        self._group, self.every, self.timeout_s = group, every, timeout_s
        self._channel, self._comparing, self._found = None, False, None

    @property
    def needed(self) -> bool:
        """Whether there is another rank to agree with."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self._group) > 1 and dist.get_backend(self._group) != "fake"

    def settle(self, proposal: Proposal) -> Message:
        """Wait for all ranks, compare, and return what the first rank's seed and FLOPs are.

        Raises:
            RankDisagreementError: the ranks differ, or one of them did not come.
        """
        return self._exchange("a training forward", dataclasses.asdict(proposal), _settled)

    def check(self, facts: Mapping[str, Any]) -> None:
        """Wait for all ranks, and compare ``facts`` and the number of steps taken.

        Raises:
            RankDisagreementError: the ranks differ, or one of them did not come.
        """
        self._steps.count()
        self._exchange("check_ranks(backend)", {"facts": {**facts, _STEPS: self._steps.taken}}, _checked)

    def compare(self, number: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        """At the draw of round ``number``: compare digests of ``facts`` once in so many rounds, waiting for nobody.

        Raises:
            RankDisagreementError: the ranks did differ, or one has fallen behind by more than a whole interval.
        """
        self._steps.count()
        if self._found is not None and self._steps.now(number) >= self._found["at"]:
            raise RankDisagreementError(self._found["error"])
        due = self.every and number % self.every == 0 and self._found is None
        if self._comparing:
            decided = self._connection().poll()
            if decided is None and due:
                decided = self._connection().wait(self.timeout_s)
            self._take_note(decided)
        if due and self._found is None:
            digests = {name: _digest(value) if isinstance(value, list) else value for name, value in facts().items()}
            post = {"facts": digests | {_STEPS: self._steps.taken}, "now": self._steps.now(number)}
            self._connection().post("a training forward", post, _compared)
            self._comparing = True

    def mean(self, sensitivity: Sensitivity, what: str) -> Sensitivity:
        """The mean over all ranks: ranks see different data but must drop alike. Every rank must call it.

        Raises:
            RankDisagreementError: the ranks have measured different branches, or one of them did not come.
        """
        if not self.needed:
            return sensitivity
        decided = self._exchange(what, dataclasses.asdict(sensitivity), _averaged)
        return Sensitivity(sensitivity.names, tuple(decided["values"]), sensitivity.metric, decided["batches"])

    def give_up(self, what: str, error: BaseException) -> None:
        """Let the others, who wait or will wait in ``what``, know that this rank will not come."""
        if self.needed and not isinstance(error, RankDisagreementError):
            self._finish_comparison()
            self._connection().fail(what, f"{type(error).__name__}: {error}")

    def _exchange(self, what: str, message: Message, decide: Callable[[list[Message]], Message]) -> Message:
        self._finish_comparison()
        channel = self._connection()
        channel.post(what, message, decide)
        decided = channel.wait(self.timeout_s)
        if "error" in decided:
            raise RankDisagreementError(decided["error"])
        return decided

    def _finish_comparison(self) -> None:
        """Every rank takes turns in the same order, so a comparison that is under way ends before anything else begins."""
        if self._comparing:
            self._take_note(self._connection().wait(self.timeout_s))

    def _take_note(self, decided: Message | None) -> None:
        if decided is None:
            return
        self._comparing = False
        if "at" in decided:
            self._found = decided
        elif "error" in decided:
            raise RankDisagreementError(decided["error"])

    def _connection(self) -> _Channel:
        group = self._group if self._group is not None else dist.group.WORLD
        if self._channel is None or self._channel.group is not group:
            self._channel = _Channel(group)
            self._comparing, self._found = False, None
            self._steps.watch()
        return self._channel


_STEPS = "optimizer steps"


class _Steps:
    """Counts the training steps of this process: forwards after which some optimizer took a step.

    Forwards alone could not tell that one rank ran one more of them than the others: its patterns are the others', a step
    early. Optimizer steps are what all ranks take together.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._stepped = False
        self._watching = False

    def watch(self) -> None:
        if self._watching:
            return
        self._watching = True
        after_steps(self, _Steps._note)

    def _note(self, _: torch.optim.Optimizer) -> None:
        self._stepped = True

    def count(self) -> None:
        self.taken += self._stepped
        self._stepped = False

    def now(self, number: int) -> int:
        """The clock that all ranks share: steps, or rounds in a loop whose optimizer is none of PyTorch's."""
        return self.taken or number


class _Channel:
    """Turns of posting and deciding, through the store of a process group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self._store = _torch.process_group_store(group)
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._names = dist.get_process_group_ranks(group)
        # All ranks open their channels in the same order, so the n-th channel of each rank is the same one.
        ordinal = self._store.add(f"dropbp_fx/channels/{self._rank}", 1)
        self._prefix = f"dropbp_fx/{ordinal}"
        self._turn = 0
        self._decide: Callable[[list[Message]], Message] = _settled

    def post(self, what: str, message: Message, decide: Callable[[list[Message]], Message]) -> None:
        """Take the next turn. The one before must have been waited for, or polled until it was decided."""
        self._turn += 1
        self._decide = decide
        posted = {"rank": self._names[self._rank], "what": what, **message}
        self._store.set(self._key(self._rank), json.dumps(posted))

    def fail(self, what: str, failure: str) -> None:
        """Take the next turn, in which there is nothing but an error."""
        self.post(what, {"failure": failure}, _settled)
        if not self._rank:
            self._publish(_failed(self._names[0], what, failure))

    def poll(self) -> Message | None:
        """The decision, if it has been made; the first rank makes it, once everybody has posted."""
        if self._rank:
            return json.loads(self._store.get(self._key("decision"))) if self._has("decision") else None
        if not self._store.check([self._key(rank) for rank in range(self._size)]):
            return None
        posts = [json.loads(self._store.get(self._key(rank))) for rank in range(self._size)]
        decided = _refused(posts) or self._decide(posts)
        self._publish(decided)
        for rank in range(self._size):
            self._store.delete_key(self._key(rank))
        if self._turn > 1:  # who has posted in this turn has read the decision of the one before
            self._store.delete_key(self._key("decision", self._turn - 1))
        return decided

    def wait(self, timeout_s: float) -> Message:
        """The decision; after ``timeout_s`` an error that names who is missing."""
        # Polling rather than the store's own wait, which would keep the group's watchdogs from using the store.
        pause, patience = 0.001, timeout_s if not self._rank else 1.5 * timeout_s
        end = time.monotonic() + patience
        while (decided := self.poll()) is None:
            if time.monotonic() > end:
                return self._too_late(patience)
            time.sleep(pause)
            pause = min(1.5 * pause, 0.2)
        return decided

    def _too_late(self, waited_s: float) -> Message:
        if self._rank:
            late = f"rank {self._names[0]}"
        else:
            late = _ranks([self._names[rank] for rank in range(self._size) if not self._has(rank)])
        error = (
            f"Waited {waited_s:g} s for {late} to agree on which branches to drop. All ranks of a process group must run "
            "the same training forwards, load state and calibrate together. Where only some ranks train this model, or hold "
            "other parts of it (pipeline stages), name those that must agree: "
            "dropbp_fx.distributed.agree_across(backend, group); a slow compilation may want a longer timeout_s there."
        )
        if not self._rank:
            self._publish({"error": error})
        return {"error": error}

    def _publish(self, decided: Message) -> None:
        self._store.set(self._key("decision"), json.dumps(decided))

    def _has(self, what: int | str) -> bool:
        return bool(self._store.check([self._key(what)]))

    def _key(self, what: int | str, turn: int | None = None) -> str:
        return f"{self._prefix}/{self._turn if turn is None else turn}/{what}"


# ---- decisions of the first rank -----------------------------------------------------------------------------------


def _refused(posts: Sequence[Message]) -> Message | None:
    """An error if a rank has failed, or if ranks are at different places of their program."""
    for post in posts:
        if "failure" in post:
            return _failed(post["rank"], post["what"], post["failure"])
    if len({post["what"] for post in posts}) > 1:
        places = _by_value([(post["rank"], post["what"]) for post in posts])
        return {
            "error": f"The ranks do not run the same program: {places}. Every rank must do both, in the same order."
        }
    return None


def _failed(rank: int, what: str, failure: str) -> Message:
    return {"error": f"Rank {rank} failed in {what}, so no rank can go on: {failure}"}


def _settled(posts: Sequence[Message]) -> Message:
    error = _difference([{**post, "facts": {"seed": post["seed"], **post["facts"]}} for post in posts])
    if error is not None:
        return {"error": error}
    first = posts[0]
    return {"seed": first["initial_seed"] if first["seed"] is None else first["seed"], "flops": first["flops"]}


def _checked(posts: Sequence[Message]) -> Message:
    error = _difference(posts)
    return {} if error is None else {"error": error}


def _compared(posts: Sequence[Message]) -> Message:
    error = _difference(posts)
    return {} if error is None else {"error": error, "at": max(post["now"] for post in posts) + _STEPS_APART}


def _averaged(posts: Sequence[Message]) -> Message:
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
    return ", ".join(f"{value} on {_ranks(those)}" for value, those in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    named = [str(rank) for rank in ranks[:_RANKS_NAMED]]
    if len(ranks) > _RANKS_NAMED:
        return f"ranks {', '.join(named)} and {len(ranks) - _RANKS_NAMED} more"
    return f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(named[:-1])} and {named[-1]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def in_words(value: Any) -> str:
    """A value in words that are equal in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
