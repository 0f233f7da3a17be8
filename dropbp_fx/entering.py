"""Enter the branches of a graph into the backend's table, for each module that the graph serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from dropbp_fx import _torch
from dropbp_fx.captured import EnteredBranches, Home
from dropbp_fx.graph.branch import ResidualBranch
from dropbp_fx.graph.homes import home_of
from dropbp_fx.graph.naming import BranchName, name_branches, parameter_name
from dropbp_fx.graph.owners import owner_among
from dropbp_fx.graph.values import example_value
from dropbp_fx.policy.branches import Branch, in_model
from dropbp_fx.policy.presence import Presence, leaves_of
from dropbp_fx.runtime.per_module import IdentifyingParameters
from dropbp_fx.shortfall import namesakes_text, sharing_text
from dropbp_fx.state import BackendState

log = logging.getLogger("dropbp_fx")
Owners = dict[fx.Node, _torch.Owned]


def enter_branches(
    state: BackendState,
    gm: fx.GraphModule,
    branches: Sequence[ResidualBranch],
    *,
    may_drop: bool = True,
    quiet: bool = False,
) -> EnteredBranches:
    """Enter the branches of a newly compiled graph, for the module that it is compiled for.

    Without ``may_drop`` the graph runs as it is, and none of them is droppable in it. ``quiet`` takes note of what is
    amiss and warns of nothing.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    owners = _torch.outermost_modules(placeholders)
    callers = _torch.calling_modules()
    names = name_branches(branches)
    prefixes = {owned.module: "" for owned in owners.values()}
    state.live_with([*prefixes, *callers.running])
    # A piece without branches may show the whole model, whose other pieces have some; the largest goes first.
    for module in sorted(prefixes, key=lambda module: -len(list(module.modules()))):
        _find_home(state, module, callers)
        prefixes[module] = state.modules.path_of(module)
    inputs = [parameters_of(branch) for branch in branches]
    roots = [[owners[node].module for node in nodes if node in owners] for nodes in inputs]
    homes = [modules[0] for modules in roots if modules]
    model = _model_of(state, list(dict.fromkeys(homes)), callers) if branches else 1
    entries: list[Branch] = []
    droppable: list[int] = []
    trainable: set[int] = set()
    modes: set[bool] = set()
    idle: list[object] = []
    for position, (branch, name, nodes, modules) in enumerate(zip(branches, names, inputs, roots, strict=True)):
        own_modes = {root.training for root in modules}
        modes |= own_modes or {True}
        full, layer = _in_table(name, prefixes[modules[0]] if modules else "", model)
        wanted = any(example_value(output).requires_grad for output, _ in branch.outputs)
        drops = may_drop and torch.is_grad_enabled() and wanted and own_modes != {False}
        trains = any(example_value(node).requires_grad for node in nodes if _is_own(owners, node))
        if torch.is_grad_enabled() and wanted and own_modes == {False}:
            idle += [value for node in nodes if node in owners and _is_trained(value := owners[node].value)]
        if modules:
            _report_namesake(state, full, modules[0], quiet=quiet)
        entry = state.sampler.add_branch(full, layer, trainable=trains, droppable=drops)
        entries.append(entry)
        if drops:
            droppable.append(position)
        if trains:
            trainable.add(entry.index)
        log.info("residual branch %s in layer %s%s", full, layer, "" if drops else " (never dropped here)")
    training = bool(branches) and torch.is_grad_enabled() and True in modes
    home = homes[0] if homes else None
    parameters = [_owned_parameters(owners, nodes) for nodes in inputs]
    position_of = {node: position for position, node in enumerate(placeholders)}
    presence = Presence(
        branches=tuple(branch.index for branch in entries),
        droppable=frozenset(entries[position].index for position in droppable),
        trainable=frozenset(trainable),
        trains=training and (bool(droppable) or _requires_gradient(gm)),
        leaves={
            branch.index: leaves_of(owners[node].value for node in own)
            for branch, own in zip(entries, parameters, strict=True)
        },
    )
    return EnteredBranches(
        branches=tuple(entries),
        names=names,
        droppable=tuple(droppable),
        identifying=_identifying(placeholders, owners, home),
        prefix=prefixes[home] if home is not None else "",
        model=model,
        presence=presence,
        parameters=tuple(tuple(position_of[node] for node in own) for own in parameters),
        training=training,
        idle=leaves_of(idle),
        home=Home(home) if home is not None else None,
        given=tuple((node.name, example_value(node)) for node in placeholders if _is_given(owners, node)),
    )


def _find_home(state: BackendState, module: nn.Module, callers: _torch.Callers) -> None:
    """Register the model that ``module`` is a layer of, if it is compiled by itself and its callers tell."""
    if not state.modules.knows(module):
        home = home_of(module, callers.called)
        if home is not None:
            state.modules.register(home)


def enter_module(state: BackendState, entered: EnteredBranches, parameters: Sequence[Tensor]) -> list[Branch] | None:
    """The branches of the module of these parameters, one that a graph serves: entered like others.

    Returns:
        ``None`` for the module that the graph was compiled for, and for one that cannot be told from it.
    """
    place = _place(state, entered, parameters)
    if place is None:
        return None
    prefix, model = place
    if (prefix, model) == (entered.prefix, entered.model):
        return None
    own: list[Branch] = []
    for branch, name in zip(entered.branches, entered.names, strict=True):
        full, layer = _in_table(name, prefix, model)
        trains, drops = branch.index in entered.presence.trainable, branch.index in entered.presence.droppable
        mine = state.sampler.add_branch(full, layer, trainable=trains, droppable=drops)
        flops = state.sampler.rated.flops.of(branch.index, trainable=trains)
        state.sampler.rated.record_flops(mine.index, flops, trainable=trains)
        own.append(mine)
        log.info("residual branch %s in layer %s (code of %s)", full, layer, branch.name)
    state.sampler.rated.assign()
    return own


def _place(state: BackendState, entered: EnteredBranches, parameters: Sequence[Tensor]) -> tuple[str, int] | None:
    """Where in its model the module of these parameters is, and the model's number; ``None`` if that cannot be told."""
    callers = _torch.calling_modules()
    known = state.modules.place_of(parameters, entered.identifying.names)
    if known is not None:
        root, prefix = known
        return prefix, _model_of(state, [root], callers)
    module = owner_among(callers.running, parameters, entered.identifying.names)
    if module is not None:
        module = _torch.original_module(module)
        _find_home(state, module, callers)
        model = _model_of(state, [module], callers)
        if model != entered.model or (entered.home is not None and entered.home.is_taken_by(module)):
            return state.modules.path_of(module), model
    state.shortfall.report("sharing", sharing_text([branch.name for branch in entered.branches[:3]]))
    return None


def _model_of(state: BackendState, roots: Sequence[nn.Module], callers: _torch.Callers) -> int:
    """The number of the model that these modules are, or are parts of."""
    around = [module for root in roots for module in state.modules.roots_around(root)]
    state.live_with([*around, *callers.running])
    number, replaces = state.models.number_of(list(dict.fromkeys(around)), callers.running)
    if replaces:
        state.sampler.forget(number)
    return number


def _in_table(name: BranchName, prefix: str, model: int) -> tuple[str, str]:
    """What a branch and its layer are called in the table."""
    full = name.below(prefix)
    return in_model(full.name, model), in_model(full.layer, model)


def _report_namesake(state: BackendState, name: str, root: nn.Module, *, quiet: bool) -> None:
    """Two modules that run inside of one other may be layers of it or models of their own: that is for the user to say."""
    known = state.holders.get(name)
    state.holders.setdefault(name, root)
    if known is None or known is root:
        return
    if root in set(known.modules()) or known in set(root.modules()):
        return
    state.shortfall.report("namesakes", namesakes_text(name, known, root), quiet=quiet)


def _identifying(placeholders: Sequence[fx.Node], owners: Owners, home: nn.Module | None) -> IdentifyingParameters:
    """The first and the last argument that is a parameter of the module ``home``."""
    named = [
        (position, name_of)
        for position, node in enumerate(placeholders)
        if node in owners and home is not None and owners[node].module is home
        if (name_of := parameter_name(home, owners[node].value)) is not None
    ]
    ends = named[:: max(len(named) - 1, 1)][:2]
    return IdentifyingParameters(tuple(position for position, _ in ends), tuple(name for _, name in ends))


def _owned_parameters(owners: Owners, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """A branch's own parameters among its ``inputs``, if all that are trained are known as objects."""
    owned = [node for node in inputs if node in owners and isinstance(owners[node].value, nn.Parameter)]
    trained = [node for node in inputs if _is_own(owners, node) and example_value(node).requires_grad]
    return owned if set(trained) <= set(owned) else []


def _is_trained(value: object) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def _is_own(owners: Owners, node: fx.Node) -> bool:
    """Whether a graph input that a branch reads is its own, rather than what an earlier graph hands over: the stream."""
    return node in owners or isinstance(example_value(node), nn.Parameter)


def _is_given(owners: Owners, node: fx.Node) -> bool:
    """Whether a graph input is a tensor that is no module's."""
    return isinstance(example_value(node), Tensor) and not _is_own(owners, node)


def _requires_gradient(gm: fx.GraphModule) -> bool:
    """Whether a graph returns anything that requires a gradient."""
    returned = gm.graph.output_node().all_input_nodes
    values = [example_value(node) for node in returned]
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def parameters_of(branch: ResidualBranch) -> list[fx.Node]:
    """Graph inputs that a branch reads and that are tensors of floating point: its parameters and buffers."""
    graph_inputs: dict[fx.Node, None] = {}
    for node in branch.readers:
        for parent in node.all_input_nodes:
            if parent.op == "placeholder":
                # Inside nested checkpoints it cannot be told which operand is meant: any of them may be.
                outer = branch.in_top_graph(parent)
                graph_inputs.update(dict.fromkeys([outer] if outer is not None else branch.anchor.all_input_nodes))
    return [
        node
        for node in graph_inputs
        if node.op == "placeholder"
        and isinstance(example_value(node), Tensor)
        and example_value(node).is_floating_point()
    ]
