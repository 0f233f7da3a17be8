"""Let the processes of a distributed run agree on what decides patterns.

Patterns are a function of seed, round, rates and branches, so ranks that agree on these once need not talk at every step.
They talk where something comes in from outside: before the first pattern, when branches turn up, after a state was loaded,
after a calibration. In between, a digest of all that decides patterns is compared once in so many rounds, and nobody waits
for it.

Everything goes through the process group's key-value store: a few hundred bytes between hosts that no stream of a device
waits for, that cannot get between two collectives of the training loop, and that has a time limit of its own. The first rank
of the group reads what every rank posts and writes down the decision, which is an error on all ranks or on none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dropbp_fx._distributed.channel import Channel
from dropbp_fx._distributed.decisions import Message, agreed, averaged, checked, compared, digest
from dropbp_fx.optimizer_steps import after_steps
from dropbp_fx.sensitivity.sensitivity import Sensitivity
from dropbp_fx.values import shown


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
        self._channel: Channel | None = None
        self._comparing = False
        self._found: Message | None = None  # a disagreement that is not yet due to be raised
        self._steps = _TrainingSteps()

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

    def agree(self, proposal: Proposal) -> Message:
        """Wait for all ranks, compare, and return what the first rank's seed and FLOPs are.

        Raises:
            RankDisagreementError: the ranks differ, or one of them did not come.
        """
        return self._exchange("a training forward", dataclasses.asdict(proposal), agreed)

    def check(self, facts: Mapping[str, Any]) -> None:
        """Wait for all ranks, and compare ``facts`` and the number of steps taken.

        Raises:
            RankDisagreementError: the ranks differ, or one of them did not come.
        """
        self._steps.count()
        self._exchange("check_ranks(backend)", {"facts": {**facts, _STEPS: self._steps.taken}}, checked)

    def compare(self, number: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        """At round ``number``: compare digests of ``facts`` once in so many rounds, waiting for nobody.

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
            digests = {name: digest(value) if isinstance(value, list) else value for name, value in facts().items()}
            post = {"facts": digests | {_STEPS: self._steps.taken}, "now": self._steps.now(number)}
            self._connection().post("a training forward", post, compared)
            self._comparing = True

    def mean(self, sensitivity: Sensitivity, what: str) -> Sensitivity:
        """The mean over all ranks: ranks see different data but must drop alike. Every rank must call it.

        Raises:
            RankDisagreementError: the ranks have measured different branches, or one of them did not come.
        """
        if not self.needed:
            return sensitivity
        decided = self._exchange(what, dataclasses.asdict(sensitivity), averaged)
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

    def _connection(self) -> Channel:
        group = self._group if self._group is not None else dist.group.WORLD
        if self._channel is None or self._channel.group is not group:
            self._channel = Channel(group)
            self._comparing, self._found = False, None
            self._steps.watch()
        return self._channel


_STEPS = "optimizer steps"


class _TrainingSteps:
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
        after_steps(self, _TrainingSteps._note)

    def _note(self, _: torch.optim.Optimizer) -> None:
        self._stepped = True

    def count(self) -> None:
        self.taken += self._stepped
        self._stepped = False

    def now(self, number: int) -> int:
        """The clock that all ranks share: steps, or rounds in a loop whose optimizer is none of PyTorch's."""
        return self.taken or number
