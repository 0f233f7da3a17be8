"""The report: what its title says, what the page holds, and how it looks in a real browser, on a screen and on a phone."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from dropbp_fx import DropPolicy, dropbp_backend, explain
from dropbp_fx.inspect import Explanation, Given
from dropbp_fx.inspect.given import describe_given
from tests.browser import CHROMIUM, Browser
from tests.test_models import IDS, SMALL, ResidualMLP, X

BATCH, SEQUENCE = IDS.shape


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "use_cache": False, **changes}))


@functools.cache
def plain() -> Explanation:
    return explain(llama(), input_ids=IDS, labels=IDS, backend=dropbp_backend(0.5, inner="aot_eager"))


@functools.cache
def with_lora() -> Explanation:
    """Of a model whose names are long, as those of PEFT's are, and several groups of branches."""
    model = peft.get_peft_model(llama().to(torch.bfloat16), peft.LoraConfig(r=8, target_modules="all-linear"))
    policy = DropPolicy(0.25, granularity="layer")
    backend = dropbp_backend(policy=policy, inner="aot_eager")
    return explain(model, input_ids=IDS, labels=IDS, backend=backend)


@functools.cache
def live() -> Explanation:
    model, backend = llama(), dropbp_backend(0.5, inner="aot_eager", policy="freezing")
    run = torch.compile(model, backend=backend)
    for _ in range(2):
        run(input_ids=IDS, labels=IDS).loss.backward()
    return explain(backend)


def of_nothing() -> Explanation:
    return explain(torch.nn.Linear(8, 8), X, backend=dropbp_backend(inner="aot_eager"))


class TestTitle:
    """The model and what it was given."""

    def test_a_plain_model(self) -> None:
        assert plain().given.title == (
            f"LlamaForCausalLM: batch {BATCH}, sequence {SEQUENCE}, float32, all parameters trained, rate 0.5, "
            "policy dropbp, device cpu"
        )

    def test_a_peft_model_is_the_model_inside_and_its_adapter(self) -> None:
        assert with_lora().given.title == (
            f"LlamaForCausalLM: batch {BATCH}, sequence {SEQUENCE}, bfloat16 frozen, float32 trained, LoRA rank 8, "
            "rate 0.25, policy of its own (pattern random, schedule constant, granularity layer), device cpu"
        )

    def test_a_backend_that_has_run_knows_its_model(self) -> None:
        given = live().given
        assert given.title == (
            f"LlamaForCausalLM: batch {BATCH}, sequence {SEQUENCE}, float32, all parameters trained, rate 0.5, "
            "policy freezing, device cpu"
        )
        assert given.forwards == 2
        assert [(i.name, i.shape, i.dtype) for i in given.inputs] == [("input_ids", tuple(IDS.shape), "int64")]

    @pytest.mark.thorough
    def test_a_wrapped_peft_model_that_has_run(self) -> None:
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        backend = dropbp_backend(inner="aot_eager")
        torch.compile(model, backend=backend)(input_ids=IDS, labels=IDS).loss.backward()
        assert explain(backend).given.title.startswith(
            f"LlamaForCausalLM: batch {BATCH}, sequence {SEQUENCE}, float32, LoRA"
        )

    def test_a_model_that_was_let_go_of(self) -> None:
        given = describe_given([], live().given.inputs, DropPolicy(0.5), 0.5, forwards=2)
        assert given.title == f"a model: batch {BATCH}, sequence {SEQUENCE}, rate 0.5, policy dropbp"

    @pytest.mark.thorough
    def test_layers_that_are_compiled_one_by_one(self) -> None:
        model, backend = llama(), dropbp_backend(inner="aot_eager")
        for layer in model.model.layers:
            layer.compile(backend=backend)
        model(input_ids=IDS, labels=IDS).loss.backward()
        shape = f"argument 0 ({BATCH} x {SEQUENCE} x {model.config.hidden_size} float32)"
        assert explain(backend).given.title.startswith(f"LlamaForCausalLM: batch {BATCH}, {shape}, float32, all")

    def test_inputs_that_are_no_tokens_have_their_shape(self) -> None:
        assert (
            f"batch {X.shape[0]}, x ({' x '.join(map(str, X.shape))} float32)" in explain(ResidualMLP(), X).given.title
        )

    def test_sizes_that_vary(self) -> None:
        model, backend = ResidualMLP(), dropbp_backend(inner="aot_eager")
        torch.compile(model, backend=backend, dynamic=True)(X).sum().backward()
        assert "ResidualMLP: batch any" in explain(backend).given.title

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda model: model.blocks[0].requires_grad_(False), "% of the parameters trained"),
            (lambda model: model.to("meta"), "device meta"),
            (lambda model: model.bfloat16(), "bfloat16, all"),
        ],
    )
    def test_what_is_trained_and_where(self, change: Callable[[Any], Any], words: str) -> None:
        model = ResidualMLP()
        change(model)
        x = X.to(next(model.parameters()).dtype)
        assert words in explain(model, x, backend=dropbp_backend(inner="aot_eager")).given.title

    @pytest.mark.thorough
    def test_other_adapters_go_by_peft_s_name(self) -> None:
        model = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM"))
        assert ", IA3, rate 0.5" in explain(model, input_ids=IDS, labels=IDS).given.title

    def test_no_tensor_and_no_module_is_kept(self) -> None:
        def plain_data(value: Any) -> bool:
            return value is None or isinstance(value, (str, int, float))

        given = with_lora().given
        assert all(plain_data(value) for name, value in vars(given).items() if name != "inputs")
        assert all(plain_data(size) for i in given.inputs for size in (i.name, i.dtype, *i.shape))
        assert isinstance(given, Given)

    def test_text_and_json_say_it_too(self) -> None:
        first, second = str(with_lora()).splitlines()[:2]
        assert first.startswith("LlamaForCausalLM: 4 residual branches")
        assert second.startswith(
            f"Given: batch {BATCH}, sequence {SEQUENCE}, bfloat16 frozen, float32 trained, LoRA rank 8"
        )
        assert live().as_dict()["given"]["policy"] == "freezing"


def written(explanation: Explanation, folder: Path) -> str:
    explanation.save_html(folder / "report.html")
    return (folder / "report.html").read_text()


def words_of(text: str) -> str:
    """What a reader sees of a page, in one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", text[text.index("<body") :], flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


@pytest.mark.thorough
class TestPage:
    @pytest.mark.parametrize("explained", [plain, with_lora, live])
    def test_its_first_words_are_the_title(self, explained: Callable[[], Explanation], tmp_path: Path) -> None:
        text, given = written(explained(), tmp_path), explained().given
        assert f"<title>{given.title} - DropBP report</title>" in text
        assert words_of(text).startswith(" ".join([given.model, *given.facts, "DropBP report"]))
        assert ("that has run 2 training forwards" in words_of(text)) == (given.forwards == 2)
        assert ("nothing was run" in words_of(text)) == (given.forwards is None)

    def test_every_figure_of_the_table_has_its_unit_and_label(self, tmp_path: Path) -> None:
        text = written(plain(), tmp_path)
        attention = plain().branches[0]
        cells = dict(re.findall(r'<td data-label="([^"]+)"[^>]*>(.*?)</td>', text))
        assert re.fullmatch(r"[\d.]+ [kM]?FLOPs", cells["backward, if kept"])
        assert re.fullmatch(r"[\d.]+ [kM]?FLOPs", cells["forward"])
        assert cells["held for the backward, kept / dropped"].endswith("B / 0 B")
        assert cells["drop rate"] == f"{attention.rate:g}"
        assert all(f">{label}</th>" in text for label in cells)

    def test_the_plot_has_axes_and_a_legend(self, tmp_path: Path) -> None:
        text = written(plain(), tmp_path)
        plot = words_of("<body>" + text[text.index('<svg class="curve"') : text.index("</section>")])
        for words in (
            "FLOPs of a step",
            "held for the backward",
            "drop rate",
            "% of a step at rate 0",
            "100 %",
            "0.25",
        ):
            assert words in plot

    def test_it_is_self_contained_and_escapes(self, tmp_path: Path) -> None:
        text = written(plain(), tmp_path)
        for loading in ("src=", 'href="http', "@import", "url("):
            assert loading not in text
        assert text.count("<svg") == 1 + (4 if shutil.which("dot") else 0)
        model = ResidualMLP()
        type(model).__name__ = "<script>alert(1)</script>"
        try:
            hostile = explain(model, X, backend=dropbp_backend(inner="aot_eager"))
        finally:
            type(model).__name__ = "ResidualMLP"
        assert "<script>alert" not in written(hostile, tmp_path)

    def test_without_graphviz_there_is_no_error_but_a_line_on_how_to_get_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        shown = words_of(written(plain(), tmp_path))
        assert "Debian and Ubuntu: apt install graphviz; macOS: brew install graphviz" in shown
        for wrong in ("not found", "'dot'", "error", "The graph of a layer"):
            assert wrong not in shown

    def test_without_branches_it_says_so_and_shows_no_empty_figures(self, tmp_path: Path) -> None:
        text = written(of_nothing(), tmp_path)
        assert of_nothing().shortfall[0].split(":")[0] in words_of(text)
        for empty in ("<svg", 'id="rate"', 'id="heat-value"', "Graphviz", "<table"):
            assert empty not in text[text.index("<body") : text.index("<script")]

    def test_causes_of_less_dropping_are_told(self, tmp_path: Path) -> None:
        explanation = plain()
        explanation.shortfall, before = ("Layers are <shared>.",), explanation.shortfall
        try:
            assert '<p class="warn" role="note">Layers are &lt;shared&gt;.</p>' in written(explanation, tmp_path)
        finally:
            explanation.shortfall = before

    def test_without_jinja2_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(ImportError, match=r"needs jinja2 .* pip install 'dropbp-fx\[inspect\]'"):
            plain().save_html(tmp_path / "report.html")


# ---- in a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A headless Chromium of a width and a colour scheme."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    window = Browser(*request.param)
    yield window
    window.close()


#: Elements that reach beyond the window and are in nothing that scrolls, and texts that are cut off in their element.
OUTSIDE = """
const found = [];
for (const element of document.querySelectorAll("main, main *")) {
  const box = element.getBoundingClientRect();
  if (!box.width || element.closest("thead") && getComputedStyle(element.closest("thead")).position === "absolute") continue;
  const within = element.parentElement.closest(".scroll");
  if (!within && (box.right > innerWidth + 1 || box.left < -1)) found.push(element.outerHTML.slice(0, 80));
}
return found;
"""
#: The least contrast of the page's texts against what they are on (WCAG), where that is one colour.
CONTRAST = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => {
  const [r, g, b] = c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  const own = element === null ? [255, 255, 255, 1] : channels(getComputedStyle(element).backgroundColor);
  const share = own.length > 3 ? own[3] : 1;
  if (share === 1) return own.slice(0, 3);
  const below = behind(element.parentElement);
  return below.map((v, i) => share * own[i] + (1 - share) * v);
};
let least = [99, ""];
for (const element of document.querySelectorAll("main *")) {
  if (element.closest("svg, select") || !element.getClientRects().length) continue;
  if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const pair = [light(channels(getComputedStyle(element).color).slice(0, 3)), light(behind(element))].sort((a, b) => b - a);
  const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
  if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 80)];
}
return least;
"""


@pytest.mark.browser
@pytest.mark.thorough
class TestInABrowser:
    @pytest.mark.parametrize("explained", [plain, with_lora, live, of_nothing])
    def test_nothing_is_clipped_and_all_can_be_read(
        self, browser: Browser, explained: Callable[[], Explanation], tmp_path: Path
    ) -> None:
        explained().save_html(tmp_path / "report.html")
        browser.get((tmp_path / "report.html").as_uri())
        assert browser.run("return document.documentElement.scrollWidth") <= browser.width
        assert browser.run(OUTSIDE) == []
        tables = "return [...document.querySelectorAll('.branches, .heat')].map(e => e.scrollWidth - e.clientWidth)"
        assert set(browser.run(tables)) <= {0}
        contrast, where = browser.run(CONTRAST)
        assert contrast >= 4.5, where
        back = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back[4:-1].split(","))) < 384) == (browser.scheme == "dark")
        assert browser.complaints() == []

    def test_slider_variants_and_heat_map(self, browser: Browser, tmp_path: Path) -> None:
        plain().save_html(tmp_path / "report.html")
        browser.get((tmp_path / "report.html").as_uri())

        def text(name: str) -> str:
            return str(browser.run("return document.getElementById(arguments[0]).textContent", name))

        def set_rate(rate: float) -> None:
            browser.run(
                "const s = document.getElementById('rate'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
                rate,
            )

        for rate in (0.0, 0.5, 0.9):
            set_rate(rate)
            expected = plain().predict(rate)
            assert text("rate-out") == f"{rate:.2f}"
            assert float(text("cost").split()[0]) == pytest.approx(100 * expected.relative_cost, abs=0.06)
            assert float(text("memory").split()[0]) == pytest.approx(100 * expected.relative_memory, abs=0.06)
        set_rate(0.52)
        between = float(text("cost").split()[0]) / 100
        low, high = plain().predict(0.5).relative_cost, plain().predict(0.55).relative_cost
        assert between == pytest.approx(low + 0.4 * (high - low), abs=6e-4)

        if shutil.which("dot"):
            browser.run("document.getElementById('variant-2').click()")
            shown = "return [...document.querySelectorAll('[data-variant]')].filter(g => !g.hidden)"
            assert browser.run(f"{shown}.map(g => g.dataset.variant)") == ["2"]
            hollow = "return document.querySelectorAll('[data-variant=\"2\"] .pruned').length"
            svg = plain().to_svg(dropped=["model.layers.0.mlp"])
            assert browser.run(hollow) == svg.count('class="node pruned"') > 0

        cell = "return document.getElementById('heat-body').rows[0].cells[1].textContent"
        before = browser.run(cell)
        assert text("heat-most").endswith("FLOPs")
        browser.run(
            "const s = document.getElementById('heat-value'); s.value = 'rate'; s.dispatchEvent(new Event('change'))"
        )
        assert before != browser.run(cell) == text("heat-most") == "0.50"
        assert browser.complaints() == []
