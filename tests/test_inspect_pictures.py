"""Pictures: what a graph shows for a pattern, and heat maps."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from dropbp_fx import dropbp_backend, explain
from dropbp_fx.inspect import Explanation, record_patterns
from dropbp_fx.inspect.graph_view import GraphView, view_layer
from tests.test_models import IDS, SMALL, ResidualMLP, X, square_loss

pytestmark = pytest.mark.thorough

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz (the program dot) is not installed")


@functools.cache
def explained() -> Explanation:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, use_cache=False))
    return explain(model, input_ids=IDS, labels=IDS, backend=dropbp_backend(0.5, inner="aot_eager"))


def view(dropped: set[int], *, detail: bool = False) -> GraphView:
    """The first layer, whose branches 0 and 1 are regions 1 and 2."""
    return view_layer(explained()._graphs[0], [1, 2], dropped, detail=detail)


class TestGraphView:
    def test_nothing_is_pruned_when_nothing_is_dropped(self) -> None:
        shown = view(set())
        assert not [node for node in shown.nodes if node.pruned]
        assert {node.branch for node in shown.nodes} == {None, 0, 1}
        assert {node.backward for node in shown.nodes} == {False, True}

    @pytest.mark.parametrize("branch", [0, 1])
    def test_the_flops_of_the_pruned_nodes_are_the_branch_s_backward(self, branch: int) -> None:
        shown = view({branch}, detail=True)
        pruned = [node for node in shown.nodes if node.pruned]
        assert sum(node.flops for node in pruned) == explained().branches[branch].backward_flops
        assert {node.branch for node in pruned} == {branch}
        kept = [node for node in shown.nodes if node.backward and not node.pruned and node.flops]
        assert sum(node.flops for node in kept) == explained().branches[1 - branch].backward_flops

    def test_a_dropped_branch_s_forward_stays_and_nothing_of_it_is_saved(self) -> None:
        shown = view({1})
        forward = [node for node in shown.nodes if node.branch == 1 and not node.backward and node.flops]
        assert sum(node.flops for node in forward) == explained().branches[1].forward_flops
        assert not [node for node in forward if node.pruned or node.saved]
        assert [node for node in view(set()).nodes if node.branch == 1 and node.saved]

    def test_the_gradient_passes_a_dropped_branch_by(self) -> None:
        """From the gradient that enters the MLP's region straight to the attention's."""
        shown = view({1})
        entries = [node.key for node in shown.nodes if node.label == "gradient in"]
        assert len(entries) == 2
        assert (entries[1], entries[0]) in shown.edges or (entries[0], entries[1]) in shown.edges

    def test_moves_of_data_are_shown_with_detail_only(self) -> None:
        plain = {node.label for node in view(set()).nodes}
        detailed = {node.label for node in view(set(), detail=True).nodes}
        assert "view" not in plain
        assert "view" in detailed
        keys = {node.key for node in view(set()).nodes}
        assert all(source in keys and target in keys for source, target in view(set()).edges)


class TestDrawing:
    @needs_graphviz
    def test_svg_has_a_hollow_node_for_each_pruned_one(self, tmp_path: Path) -> None:
        explained().draw(tmp_path / "graph.svg", dropped=["model.layers.0.mlp"])
        text = (tmp_path / "graph.svg").read_text()
        assert text.count('class="node pruned"') == sum(node.pruned for node in view({1}).nodes) > 0
        assert "model.layers.0.mlp dropped" in text
        for name in ("forward", "backward"):
            assert f">{name}</text>" in text

    def test_dot_needs_no_graphviz(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        explained().draw(tmp_path / "graph.dot", layer="model.layers.1")
        assert (tmp_path / "graph.dot").read_text().startswith("digraph")
        with pytest.raises(RuntimeError, match="needs Graphviz, whose program 'dot' was not found. Install it"):
            explained().draw(tmp_path / "graph.svg")

    def test_errors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="drawn as .svg, .png, .pdf or .dot, not '.gif'"):
            explained().draw(tmp_path / "graph.gif")
        with pytest.raises(KeyError, match="no layer 'model.layers.7' with a droppable branch; the first ones are"):
            explained().draw(tmp_path / "graph.dot", layer="model.layers.7")
        with pytest.raises(ValueError, match="has no droppable branch"):
            explain(torch.nn.Linear(8, 8), X).draw(tmp_path / "graph.dot")
        monkeypatch.setitem(sys.modules, "pydot", None)
        with pytest.raises(ImportError, match=r"needs pydot .* pip install 'dropbp-fx\[inspect\]'"):
            explained().draw(tmp_path / "graph.dot")

    def test_heat_map(self, tmp_path: Path) -> None:
        explained().draw_heatmap(tmp_path / "map.png", "saved_bytes")
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="shows one of 'rate', .* not 'colour'"):
            explained().draw_heatmap(tmp_path / "map.png", "colour")
        with pytest.raises(ValueError, match="No branch has a sensitivity.* Let a policy measure it"):
            explained().draw_heatmap(tmp_path / "map.png", "sensitivity")

    def test_the_history_of_a_run(self, tmp_path: Path) -> None:
        model = ResidualMLP()
        backend = dropbp_backend(0.5, inner="aot_eager", seed=1)
        run = torch.compile(model, backend=backend)
        square_loss(run).backward()
        with record_patterns(backend) as history:
            for _ in range(6):
                square_loss(run).backward()
            with backend.pinned([0, 2]):
                square_loss(run).backward()
        square_loss(run).backward()
        assert len(history.patterns) == 7
        assert history.patterns[-1] == {0, 2}
        assert sum(len(pattern) for pattern in history.patterns) == sum(7 * rate for rate in history.rates().values())
        assert list(history.rates()) == ["blocks.0", "blocks.1", "blocks.2"]
        history.draw(tmp_path / "history.png")
        assert (tmp_path / "history.png").stat().st_size > 1000
        history.patterns.clear()
        with pytest.raises(ValueError, match="No training forward was recorded"):
            history.draw(tmp_path / "history.png")
