"""The command line: what it prints, what it writes, and that every error is one sentence with the remedy."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from dropbp_fx.inspect import cli, doctor

pytestmark = pytest.mark.thorough

TINY = ["--set", "num_hidden_layers=2", "--set", "hidden_size=64", "--set", "intermediate_size=96"]
TINY += ["--set", "num_attention_heads=4", "--set", "num_key_value_heads=2", "--set", "vocab_size=100", "--seq", "16"]
TINY += ["--inner", "aot_eager"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("The command line used the network.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def test_a_model_type_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "llama", *TINY, "--rate", "0.25") == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM: 4 residual branches" in text
    assert "model.layers.{0..1}.self_attn" in text
    assert "0.25" in text


def test_settings_dtype_batch_and_lora_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for extra in (["--dtype", "float32"], ["--dtype", "float32", "--batch", "2"], ["--lora-rank", "4"]):
        assert run("explain", "llama", *TINY, "--set", "num_hidden_layers=1", *extra, "--json") == 0
        figures.append(json.loads(capsys.readouterr().out))
    one, two, lora = figures
    assert two["branches"][1]["forward_flops"] == 2 * one["branches"][1]["forward_flops"]
    assert one["branches"][1]["saved_bytes_kept"] < two["branches"][1]["saved_bytes_kept"]
    mlp = lora["branches"][1]
    assert mlp["trainable_parameters"] == 3 * 4 * (64 + 96)
    assert mlp["name"].endswith("model.layers.0.mlp")
    assert lora["trainable_parameters"] < one["trainable_parameters"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_config_json_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], as_folder: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    hf.ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(tmp_path)
    source = tmp_path if as_folder else tmp_path / "config.json"
    assert run("explain", str(source), "--inner", "aot_eager") == 0
    assert "ViTForImageClassification: 6 residual branches" in capsys.readouterr().out


def test_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("out.json", "out.html", "out.dot")]
    assert run("explain", "llama", *TINY, "--json", names[0], "--html", names[1], "--svg", names[2], "--markdown") == 0
    assert "| branch" in capsys.readouterr().out
    assert len(json.loads(Path(names[0]).read_text())["branches"]) == 4
    assert "</html>" in Path(names[1]).read_text()
    assert Path(names[2]).read_text().startswith("digraph")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lama"], "has no model type 'lama'; did you mean llama"),
        (["zzzz"], "some it has are llama, bert and vit"),
        (["some/folder"], "There is no file or folder 'some/folder'. Nothing is downloaded"),
        (["llama", "--set", "hidden_sise=3"], "has no entry 'hidden_sise'; did you mean hidden_size"),
        (["llama", "--set", "hidden_size"], "--set takes name=value, such as num_hidden_layers=80, not 'hidden_size'"),
        (["gpt2", "--seq", "4000"], "gpt2 takes 1024 tokens at most, not 4000. Give a shorter --seq"),
        (["llama", *TINY, "--set", "hidden_size=abc"], "refuses 'hidden_size=abc'"),
        (["llama", *TINY, "--svg", "out.gif"], "drawn as .svg, .png, .pdf or .dot, not '.gif'"),
        (["llama", *TINY, "--html", "/no/such/folder/out.html"], "No such file or directory"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert error.startswith("dropbp-fx explain: error: ")
    assert "\n" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["explain", "llama", "--rate", "1"], "argument --rate: '1' is not a rate in [0, 1)"),
        (["explain", "llama", "--batch", "0"], "argument --batch: '0' is not a whole number of at least 1"),
        (["explain", "llama", "--lora-rank", "x"], "'x' is not a whole number of at least 0"),
        (["explain"], "the following arguments are required: CONFIG"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_config_that_is_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert run("explain", str(tmp_path)) == 2
    assert "is no JSON file" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    assert run("explain", str(tmp_path)) == 2
    assert "has the model_type 'gpt9', which transformers" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert run("explain", str(tmp_path)) == 2
    assert "holds no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("transformers", []), ("peft", ["--lora-rank", "2"])])
def test_missing_extras_are_named(
    module: str, extra: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run("explain", "llama", *TINY, *extra) == 2
    assert "pip install 'dropbp-fx[inspect]'" in capsys.readouterr().err


def test_help_names_every_argument_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "CONFIG",
        "--set",
        "--batch",
        "--seq",
        "--dtype",
        "--lora-rank",
        "--rate",
        "--json",
        "--html",
        "--svg",
    ):
        assert option in text
    for parser in _parsers():
        assert all(action.help for action in parser._actions)


def _parsers() -> list[Any]:
    (commands,) = (action for action in cli.parser()._actions if action.dest == "command")
    return list(commands.choices.values())


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert "aot_eager  gradients and None gradients agree with eager" in text
    assert "inductor   not checked: there is no C++ compiler. Install g++, or set CXX." in text
    assert "transformers" in text


@pytest.mark.slow  # continuous integration runs the command itself
@pytest.mark.inductor
def test_doctor_checks_inductor() -> None:
    assert doctor.self_check("inductor") is None


def test_doctor_finds_wrong_gradients_and_missing_hooks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(gm: Any, _inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        def run_and_double(*inputs: Any) -> Any:
            return [None if value is None else 2 * value for value in gm.forward(*inputs)]

        return make_boxed_func(run_and_double)

    problem = doctor.self_check((wrong, wrong))
    assert problem is not None
    assert "the loss is" in problem
    monkeypatch.setattr(doctor._torch, "hooks", lambda: {"torch._inductor.gone": False})
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    assert run("doctor") == 1
    assert "missing: torch._inductor.gone" in capsys.readouterr().out
