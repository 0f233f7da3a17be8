"""The command line: ``dropbp-fx explain`` and ``dropbp-fx doctor``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import dropbp_fx
from dropbp_fx.inspect import doctor, huggingface
from dropbp_fx.policy.drop_policy import checked_rate
from dropbp_fx.policy.units import Granularity

_EXPLAIN = """\
Say what would be dropped in a model and what that saves, from its configuration alone: nothing is downloaded, no weight is
allocated and nothing is compiled. Prints the branches, those of identical layers merged, and the predicted cost of a step
and memory for the backward at a few drop rates.
"""
_EXAMPLES = """\
examples:
  dropbp-fx explain llama --set num_hidden_layers=80 --set hidden_size=8192 --batch 1 --seq 4096
  dropbp-fx explain path/to/model/config.json --lora-rank 8 --rate 0.7 --html report.html
  dropbp-fx explain vit --batch 32 --dtype float32 --json
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; the documentation's reference is made from it."""
    main_parser = argparse.ArgumentParser(
        prog="dropbp-fx", description="See what DropBP would drop in a model and what that saves."
    )
    main_parser.add_argument("--version", action="version", version=f"dropbp-fx {dropbp_fx.__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="what would be dropped in a model and what that saves",
        description=_EXPLAIN,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument(
        "config",
        metavar="CONFIG",
        help="a Hugging Face model type such as llama, a config.json, or a folder that holds one",
    )
    explain.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an entry of the configuration, such as num_hidden_layers=80; may be given several times",
    )
    explain.add_argument("--batch", type=_positive, default=1, help="examples in a batch (default: %(default)s)")
    explain.add_argument("--seq", type=_positive, default=512, help="tokens in a sequence (default: %(default)s)")
    explain.add_argument(
        "--dtype", choices=huggingface.DTYPES, default="bfloat16", help="of the parameters (default: %(default)s)"
    )
    explain.add_argument(
        "--lora-rank",
        type=_not_negative,
        default=0,
        metavar="R",
        help="train LoRA of this rank on every linear layer, the rest frozen (default: %(default)s, full fine-tuning)",
    )
    explain.add_argument("--rate", type=_rate, default=0.5, help="drop rate in [0, 1) (default: %(default)s)")
    explain.add_argument(
        "--granularity",
        choices=get_args(Granularity),
        default="branch",
        help="what is dropped as a whole (default: %(default)s)",
    )
    explain.add_argument(
        "--inner",
        choices=("inductor", "aot_eager"),
        default="inductor",
        help="the inner compiler, which decides what is saved for the backward (default: %(default)s)",
    )
    explain.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write every figure as JSON to FILE, or print it"
    )
    explain.add_argument("--html", type=Path, metavar="FILE", help="write a report to look at in a browser")
    explain.add_argument("--svg", type=Path, metavar="FILE", help="draw the first layer's joint graph, at --rate")
    explain.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    commands.add_parser(
        "doctor",
        help="print versions and hooks, and check that dropping works here",
        description="Print versions, the private hooks of PyTorch that were found, and the result of a ten-second check "
        "that gradients under dropping are those of an eager model. Exits with status 1 if something is wrong.",
    )
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.command == "doctor":
        text, healthy = doctor.report()
        print(text)
        return 0 if healthy else 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within transformers and peft are not the reader's business
            _explain(arguments)
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        sentence = " ".join(str(error).split())
        print(f"dropbp-fx explain: error: {sentence}", file=sys.stderr)
        return 2
    return 0


def _explain(arguments: argparse.Namespace) -> None:
    model, inputs = huggingface.build(
        arguments.config,
        arguments.settings,
        batch=arguments.batch,
        tokens=arguments.seq,
        dtype=arguments.dtype,
        lora_rank=arguments.lora_rank,
    )
    policy = dropbp_fx.DropPolicy(arguments.rate, granularity=arguments.granularity)
    backend = dropbp_fx.dropbp_backend(policy=policy, inner=arguments.inner)
    try:
        explanation = dropbp_fx.explain(model, **inputs, backend=backend)
    except (ValueError, RuntimeError):
        raise
    except Exception as error:  # a forward that its configuration's sizes break in its own way
        raise ValueError(
            f"{type(model).__name__} cannot be run in this configuration: {type(error).__name__}: {error}. Check its "
            "values, and those given with --set, against each other."
        ) from error
    if arguments.json == "-":
        print(explanation.to_json())
    else:
        print(explanation.to_markdown() if arguments.markdown else explanation)
        if arguments.json:
            explanation.to_json(arguments.json)
    if arguments.svg:
        explanation.draw(arguments.svg)
    if arguments.html:
        explanation.save_html(arguments.html)


def _positive(text: str) -> int:
    return _integer(text, 1)


def _not_negative(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def _rate(text: str) -> float:
    try:
        value: Any = float(text)
        return checked_rate(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate in [0, 1)") from error


if __name__ == "__main__":
    sys.exit(main())
