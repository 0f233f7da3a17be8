"""Turns of posting and deciding, through the key-value store of a process group."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dropbp_fx import _torch
from dropbp_fx._distributed.decisions import Message, agreed, failed, ranks_in_words, refused


class Channel:
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
        self._decide: Callable[[list[Message]], Message] = agreed

    def post(self, what: str, message: Message, decide: Callable[[list[Message]], Message]) -> None:
        """Take the next turn. The one before must have been waited for, or polled until it was decided."""
        self._turn += 1
        self._decide = decide
        posted = {"rank": self._names[self._rank], "what": what, **message}
        self._store.set(self._key(self._rank), json.dumps(posted))

    def fail(self, what: str, failure: str) -> None:
        """Take the next turn, in which there is nothing but an error."""
        self.post(what, {"failure": failure}, agreed)
        if not self._rank:
            self._publish(failed(self._names[0], what, failure))

    def poll(self) -> Message | None:
        """The decision, if it has been made; the first rank makes it, once everybody has posted."""
        if self._rank:
            return json.loads(self._store.get(self._key("decision"))) if self._has("decision") else None
        if not self._store.check([self._key(rank) for rank in range(self._size)]):
            return None
        posts = [json.loads(self._store.get(self._key(rank))) for rank in range(self._size)]
        decided = refused(posts) or self._decide(posts)
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
            late = ranks_in_words([self._names[rank] for rank in range(self._size) if not self._has(rank)])
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
