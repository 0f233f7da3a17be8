"""Say so, once, where less is dropped than was asked for: the cause, and what to do about it.

Most causes show when a graph is compiled; some only in how a run goes on. What looks for those looks at the first forwards,
or at optimizer steps while there is a doubt, and then takes itself away: a run that is in order pays nothing for it.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dropbp_fx._torch import GraphBreak
from dropbp_fx.graph.coverage import UnevenLayers
from dropbp_fx.optimizer_steps import after_steps
from dropbp_fx.policy.layers import LayersPattern
from dropbp_fx.policy.sampler import PatternSampler

#: Training forwards after which the rate that can be reached is compared with the one that was asked for.
FORWARDS = 20
#: Optimizer steps without any forward after which a backend counts as never called.
STEPS_UNCALLED = 20
#: Optimizer steps in a row, each with gradients of a graph that drops nothing, after which that is no accident.
STEPS_IDLE = 3
#: What can be reached is clearly below what was asked for if it is less than this share of it.
_CLOSE = 0.9
_PLACES_NAMED = 3
_LAYERS_NAMED = 3

Listener = Callable[[Sequence[int], frozenset[int]], None]


class LessDroppedWarning(UserWarning):
    """Less will be dropped than was asked for; the message has the cause and the remedy. ``strict=True`` raises instead."""


class NoResidualBranchWarning(UserWarning):
    """A training graph has no residual branch, so nothing in it will be dropped."""


class Shortfall:
    """What keeps one backend from dropping as much as it was asked to.

    Args:
        sampler: the backend's.
        listeners: are called with what each forward of a graph drops.
        strict: raise instead of warning.

    Attributes:
        breaks: the graph breaks found so far, in order.
        by_name: whether ``torch.compile`` was given a name, so that nobody has the object that a remedy is about.
    """

    def __init__(self, sampler: PatternSampler, listeners: list[Listener], *, strict: bool) -> None:
        self.breaks: dict[GraphBreak, None] = {}
        self.by_name = False
        self._sampler = sampler
        self._listeners = listeners
        self._strict = strict
        self._texts: dict[str, str] = {}
        self._steps = _Steps(self)
        self._listening = False

    @property
    def texts(self) -> tuple[str, ...]:
        """Every cause found so far, with its remedy."""
        return tuple(self._texts.values())

    def report(
        self,
        cause: str,
        text: str,
        category: type[Warning] = LessDroppedWarning,
        *,
        error: type[Exception] = RuntimeError,
        quiet: bool = False,
    ) -> None:
        """Warn of ``cause``, unless it was warned of before.

        Raises:
            Exception: an ``error``, where the backend is strict.
        """
        if self.by_name and _REGISTER in text:
            text += _BY_NAME_TEXT
        known = cause in self._texts
        self._texts.setdefault(cause, text)
        if quiet:
            return
        if self._strict:
            raise error(text)
        if not known:
            warnings.warn(text, category, stacklevel=3)

    # ---- what the first forwards show ------------------------------------------------------------------------------

    def watch_first_forwards(self) -> None:
        """Once in :data:`FORWARDS` training forwards all branches are known: compare what can be dropped of them."""
        if self._listening:
            return
        self._listening = True

        def listen(_indices: Sequence[int], _dropped: frozenset[int]) -> None:
            if self._sampler.forwards >= FORWARDS:
                self._listeners.remove(listen)
                self._compare_rates()

        self._listeners.append(listen)

    def _compare_rates(self) -> None:
        droppable = [branch for branch in self._sampler.branches if branch.droppable]
        if not droppable or "sharing" in self._texts or isinstance(self._sampler.rated.pattern, LayersPattern):
            return  # the last drops what it was asked to, whatever the rate
        asked = math.fsum(branch.rate for branch in droppable) / len(droppable)
        attainable = self._sampler.rated.attainable_rate()
        if attainable < _CLOSE * asked:
            self.report("rate", _rate_text(self._sampler, len(droppable), asked, attainable))

    # ---- what optimizer steps show ---------------------------------------------------------------------------------

    def expect_a_call(self) -> None:
        """The backend was made, so some graph should come before many steps are taken."""
        self._steps.watch()

    def called(self, *, cut: bool) -> None:
        """Dynamo has called the backend, with a piece of a graph that its DDPOptimizer has ``cut`` or with a whole one."""
        self._steps.called()
        if cut:
            warnings.warn(_CUT_TEXT, stacklevel=3)

    def watched(
        self, run: Callable[..., Any], parameters: Sequence[weakref.ref[Tensor]], cause: str
    ) -> Callable[..., Any]:
        """``run``, the code of a graph that ``cause`` keeps from dropping: nobody is to train ``parameters`` by it."""

        def noted(*arguments: Any) -> Any:
            self._steps.note(parameters, cause)
            return run(*arguments)

        return noted

    def at_next_forward(self, do: Callable[[], None]) -> None:
        """Call ``do`` once, when the pattern of the next training forward is known."""

        def listen(_indices: Sequence[int], _dropped: frozenset[int]) -> None:
            self._listeners.remove(listen)
            do()

        self._listeners.append(listen)

    @property
    def forwards(self) -> int:
        """Training forwards so far."""
        return self._sampler.forwards

    @property
    def asks(self) -> bool:
        """Whether anything is to be dropped at all."""
        return self._sampler.rated.rate > 0


class _Steps:
    """Looks at optimizer steps for as long as there is a doubt whether the backend has a part in them."""

    def __init__(self, shortfall: Shortfall) -> None:
        self._shortfall = weakref.ref(shortfall)
        self._hook: RemovableHandle | None = None
        self._resting = False
        self._uncalled: int | None = 0  # steps since the backend was made, None once it was called
        self._forwards = 0
        self._idle: tuple[Sequence[weakref.ref[Tensor]], str] | None = None  # what ran since the last step
        self._count = 0

    def watch(self) -> None:
        if self._hook is not None and not self._resting:
            return
        shortfall = self._shortfall()
        self._forwards = 0 if shortfall is None else shortfall.forwards
        if self._resting:
            self._resting = False
            return
        self._hook = after_steps(self, _Steps._stepped)

    def _unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._idle, self._count, self._resting = None, None, 0, False

    def _rest(self, shortfall: Shortfall) -> None:
        """Look no longer. A hook cannot be removed while PyTorch goes through the hooks, so the next forward does that."""
        self._idle, self._count, self._resting = None, 0, True

        def end() -> None:
            if self._resting:
                self._unwatch()

        shortfall.at_next_forward(end)

    def called(self) -> None:
        if self._uncalled is not None:
            self._uncalled = None
            self._unwatch()

    def note(self, parameters: Sequence[weakref.ref[Tensor]], cause: str) -> None:
        if torch.is_grad_enabled():
            self.watch()
            self._idle = parameters, cause

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        shortfall = self._shortfall()
        if shortfall is None or self._resting or not shortfall.asks:
            return
        if self._uncalled is not None:
            self._uncalled += 1
            if self._uncalled == STEPS_UNCALLED:
                self._rest(shortfall)
                shortfall.report("uncalled", _uncalled_text(shortfall._sampler.rated.rate))
            return
        if shortfall.forwards != self._forwards:  # the graph only ran beside training: an evaluation, a saliency map
            self._rest(shortfall)
            return
        if self._idle is None or not _trains(optimizer, self._idle[0]):
            return
        _, cause = self._idle
        self._idle = None
        self._count += 1
        if self._count >= STEPS_IDLE:
            self._rest(shortfall)
            text = _mode_text() if cause == "mode" else absence_text(shortfall.breaks)
            shortfall.report(cause, text, LessDroppedWarning if cause == "mode" else NoResidualBranchWarning)


def _trains(optimizer: torch.optim.Optimizer, parameters: Sequence[weakref.ref[Tensor]]) -> bool:
    """Whether the optimizer has just moved one of the parameters."""
    known = {id(p) for reference in parameters if (p := reference()) is not None}
    groups = optimizer.param_groups
    return any(id(p) in known and p.grad is not None for group in groups for p in group["params"])


#: What sentences advise for layers of one model.
_REGISTER = "call backend.register(model) before its first forward"

#: What that is where nobody has the object.
_BY_NAME_TEXT = (
    " The backend was given by its name: before the first forward call dropbp_fx.named_backend().register(model), with the "
    "options that torch.compile gets, if any; later dropbp_fx.current() is the backend."
)

#: Dynamo's DDPOptimizer is on.
_CUT_TEXT = (
    "Dynamo's DDPOptimizer has cut the model's graph where DistributedDataParallel's buckets end. Branches that it cut "
    "through are never dropped. Set torch._dynamo.config.optimize_ddp = False: the regions of this backend let "
    "communication overlap with the backward without cuts."
)


# ---- sentences -------------------------------------------------------------------------------------------------------


def breaks_in_words(breaks: Sequence[GraphBreak]) -> str:
    """The latest few breaks with their places."""
    latest = list(breaks)[-_PLACES_NAMED:]
    more = len(breaks) - len(latest)
    return "; ".join(f"{found.place} ({found.reason})" for found in latest) + (f"; and {more} more" if more else "")


def absence_text(breaks: Iterable[GraphBreak]) -> str:
    """A graph has no residual branch."""
    known = list(breaks)
    cut = (
        f" The graph breaks at {breaks_in_words(known)}: where a break lies between x and x + h, the add is in a graph "
        "that does not hold the work. Take the break out of the layer."
        if known
        else ""
    )
    return (
        "No residual branch was found in this graph: there is no add x + h of two equally shaped activations where "
        "h is computed from x by a matrix product, convolution or attention. Nothing will be dropped in it."
        f"{cut} logging.getLogger('dropbp_fx').setLevel('DEBUG') tells why each add was not taken."
    )


def cut_text(count: int, where: str, breaks: Sequence[GraphBreak]) -> str:
    """A break lies inside residual branches."""
    places = f" It breaks at {breaks_in_words(breaks)}." if breaks else ""
    adapters = (
        " torch.nn.utils.parametrize is what PEFT adapts weights of experts with (target_parameters): adapt linear layers "
        "(target_modules), or leave the experts as they are."
        if any("parametrize.py" in found.place for found in breaks)
        else ""
    )
    return (
        f"{count} residual {'add' if count == 1 else 'adds'} of {where} cannot be dropped: "
        "Dynamo breaks the graph between the value that the branch reads and the add that takes the branch, so they are in "
        f"two graphs.{places} Take the break out of the layer; with torch.compile(fullgraph=True) Dynamo refuses breaks, "
        f"and with TORCH_LOGS=graph_breaks it explains each of them.{adapters}"
    )


def uneven_text(found: Sequence[UnevenLayers]) -> str:
    """Some layers of a list hold branches and others none."""
    without = [layer for layers in found for layer in layers.without]
    names = ", ".join(f"{path} ({kind.rpartition('.')[2]})" for path, kind in without[:_LAYERS_NAMED])
    more = f" and {len(without) - _LAYERS_NAMED} more" if len(without) > _LAYERS_NAMED else ""
    return (
        f"{len(without)} {'layer holds' if len(without) == 1 else 'layers hold'} no residual branch, though others in the "
        f"same list do: none was found in {names}{more}, but there is one in {found[0].holding}. The rate goes by the "
        "branches that were found, so the model as a whole drops less than it asks for. A branch is the h of an add x + h "
        "where h is computed from x by a matrix product, convolution or attention; write what these layers add to the "
        "stream as such an add. logging.getLogger('dropbp_fx').setLevel('DEBUG') tells why each add was not taken."
    )


def sharing_text(names: Sequence[str]) -> str:
    """Layers that cannot be told apart."""
    return (
        f"One compiled graph serves several modules, so their branches ({', '.join(names)}) count as the same ones, and "
        "each module's forward as one of its own. One branch is kept in each of these forwards, so less is dropped than was "
        f"asked for. If they are layers of one model, {_REGISTER}; if they are models of their own, register each of them."
    )


def namesakes_text(name: str, known: nn.Module, other: nn.Module) -> str:
    """Two modules inside of one other look like one."""
    return (
        f"Two modules of class {type(known).__name__} and {type(other).__name__} have a branch named {name!r}, and run "
        "inside of one other module, so their branches count as the same ones. If they are layers of one model, "
        f"{_REGISTER}; if they are models of their own, register each of them."
    )


def unsupported_text(reason: str) -> str:
    """A graph writes into its inputs as no region may."""
    return (
        f"Nothing will be dropped in one of the model's graphs, because {reason}. Let the model write to a copy instead "
        "(x = x.clone()), or leave it at that: the graph trains as under torch.compile without dropping."
    )


def _mode_text() -> str:
    return (
        "The model is in evaluation mode, in which nothing is dropped, and an optimizer has taken "
        f"{STEPS_IDLE} steps with its gradients without a forward in training mode. Call model.train() before training: "
        "from_pretrained(), for one, returns a model in evaluation mode. To train without dropout, call model.train() and "
        "then eval() of the modules that are to stay in evaluation mode."
    )


def _uncalled_text(rate: float) -> str:
    return (
        f"Optimizers have taken {STEPS_UNCALLED} steps since this backend (of rate {rate:g}) was made, and no model has "
        "called it: nothing is dropped by it. Train the module that torch.compile(model, backend=backend) returns, or call "
        "model.compile(backend=backend); and see that compiling is not switched off (TORCHDYNAMO_DISABLE, "
        "TORCH_COMPILE_DISABLE, torch.compiler.set_stance, torch.compiler.disable). If nothing is meant to use this backend "
        "yet, all is well."
    )


def _rate_text(sampler: PatternSampler, count: int, asked: float, attainable: float) -> str:
    trainable = sum(branch.trainable for branch in sampler.branches if branch.droppable)
    models = len(sampler.branches.models)
    apart = (
        f" The backend serves {models} models, and one branch is kept in each: if they are layers of one model, {_REGISTER}."
        if models > 1
        else ""
    )
    unit = "layers, each dropped as a whole" if sampler.rated.granularity == "layer" else "branches"
    return (
        f"The rate asked for is {asked:.3g}, but in the long run the pattern drops {attainable:.3g} of the branches. "
        f"{count} of them can be dropped, {trainable} have something to train ({unit}), and one that has is always kept."
        f"{apart} Set a rate of at most {attainable:.3g}, which is what is dropped; or let more be dropped: "
        "granularity='branch', more trainable layers, or the whole model compiled with one backend."
    )
