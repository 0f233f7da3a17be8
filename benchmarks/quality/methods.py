"""The methods, by name. A method's rate is its own measure of what it leaves out; what that saves is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.models import Decoder
from benchmarks.quality.attempts import Accumulation, Attempt, Checkpointing, Setting
from benchmarks.quality.baselines import Freezing, NestedBatch, Selective, Skipping, SmallerBatch, Tokens
from benchmarks.quality.dropping import Engine, FreezeOut
from benchmarks.quality.patterns import CyclicWindow, FixedWindow, Sometimes, Windows
from dropbp_fx.policy.patterns import LowestPattern, WindowPattern


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        make: from a model and a setting.
        about: what it does, and whose idea it is.
    """

    make: Callable[[Decoder, Setting], Attempt]
    about: str


#: They compute what "none" computes, with less memory and in more time; their losses are those of "none".
EXACT = ("checkpointing", "accumulation")


def _engine(about: str, **arguments: Any) -> Method:
    options = arguments.pop("options", None) or {}
    make_options = options if callable(options) else lambda: options
    return Method(lambda model, setting: Engine(model, setting, options=make_options, **arguments), about)


def methods() -> dict[str, Method]:
    """All methods by name."""
    window = {"pattern": "window"}
    return {
        "none": Method(Attempt, "torch.compile, nothing dropped"),
        "checkpointing": Method(Checkpointing, "nothing dropped, every layer recomputed"),
        "accumulation": Method(Accumulation, "nothing dropped, each batch in pieces"),
        # ---- the paper's
        "random": _engine("random branches, all at one rate: DropBP, uniform"),
        "sensitivity": _engine(
            "random branches at rates by sensitivity, calibrated at 10 %: DropBP as published",
            options={"allocation": "sensitivity"},
            calibrate_at=0.1,
        ),
        # ---- other patterns
        "random layers": _engine("random whole layers", options={"granularity": "layer"}),
        "rescaled": _engine(
            "independent branches, kept ones scaled by 1 / (1 - rate): unbiased",
            options={"pattern": "independent", "rescale": True},
        ),
        "suffix": _engine("everything below a random depth", options={"pattern": "suffix"}),
        "lowest": _engine("the lowest layers, always the same ones", options={"pattern": "lowest"}),
        "weights": _engine("gradients of random branches' weights only", options={"drop": "weights"}),
        "window": _engine("a run of layers at a random place", options=window),
        "window, unwrapped": _engine("the same, not around the end", options={"pattern": WindowPattern(wrap=False)}),
        "cyclic window": _engine("a run of layers, places in turn", options=lambda: {"pattern": CyclicWindow()}),
        "two windows": _engine("two runs of layers", options=lambda: {"pattern": Windows(2)}),
        "low window": _engine(
            "the same layers always, the lowest but one", options=lambda: {"pattern": FixedWindow(0.1)}
        ),
        "middle window": _engine(
            "the same layers always, in the middle", options=lambda: {"pattern": FixedWindow(0.5)}
        ),
        "high window": _engine(
            "the same layers always, the highest but one", options=lambda: {"pattern": FixedWindow(0.9)}
        ),
        "held window": _engine("a window that stays for 10 steps", options={"pattern": "window", "hold": 10}),
        "window by sensitivity": _engine(
            "a window that follows rates by sensitivity",
            options={"pattern": "window", "allocation": "sensitivity"},
            calibrate_at=0.1,
        ),
        "sometimes": _engine(
            "a window of .9 in some steps, exact in all others",
            options=lambda: {"pattern": Sometimes(WindowPattern(), 0.9)},
        ),
        "sometimes suffix": _engine(
            "all below a fixed depth (.9) in some steps, exact in all others",
            options=lambda: {"pattern": Sometimes(LowestPattern(), 0.9)},
        ),
        "online": _engine(
            "random branches, rates by a running estimate of sensitivities",
            options={"allocation": "sensitivity", "reallocate_every": 50},
        ),
        # ---- schedules
        "random, ramp": _engine("random branches, rate from 0 to twice", options={"schedule": "ramp_up"}),
        "window, ramp": _engine("a window, rate from 0 to twice", options={**window, "schedule": "ramp_up"}),
        "window, step": _engine("a window, exact in the first half", options={**window, "schedule": "step"}),
        "suffix, ramp": _engine("suffix, rate from 0 to twice", options={"pattern": "suffix", "schedule": "ramp_up"}),
        "policy freezing": _engine(
            "the lowest layers, always the same ones, and all below them: freezing as the package does it",
            options={"policy": "freezing"},
        ),
        "progressive freezing": _engine(
            "exact at first, then the lowest layers are dropped one after the other, the embedding with the first",
            options={"policy": "progressive_freezing"},
        ),
        "progressive freezing, budget": _engine(
            "the same with activation_memory_budget=0.5",
            options={"policy": "progressive_freezing", "activation_memory_budget": 0.5},
        ),
        "progressive freezing, embedding on": _engine(
            "the same, but the embedding goes on with the part of its gradient that goes around dropped layers",
            options={"policy": "progressive_freezing", "drop": "branch"},
        ),
        "suffix, below": _engine(
            "everything below a random depth, the embedding included", options={"pattern": "suffix", "drop": "below"}
        ),
        "lowest, ramp": _engine(
            "the lowest layers, rate from 0 to twice", options={"pattern": "lowest", "schedule": "ramp_up"}
        ),
        "gradual unfreezing": _engine(
            "the highest layers first, others join them, rate from twice to 0 (Howard and Ruder, 2018)",
            options={"pattern": "lowest", "schedule": "ramp_down"},
        ),
        # ---- corrections
        "window, scaled": _engine(
            "a window; layers' learning rate times (1 - rate)^-.5", options=window, scale_power=0.5
        ),
        "window, ramp, scaled": _engine(
            "the same with a ramp", options={**window, "schedule": "ramp_up"}, scale_power=0.5
        ),
        "random, coasting": _engine("random branches; dropped parameters step along their moments", coast=1.0),
        "window, coasting": _engine("a window; dropped parameters step along their moments", options=window, coast=1.0),
        "window, fading": _engine("the same, less the longer they are dropped", options=window, coast=0.8),
        "window, ramp, coasting": _engine("the same with a ramp", options={**window, "schedule": "ramp_up"}, coast=1.0),
        "suffix, coasting": _engine(
            "everything below a random depth; what is dropped steps along its moments",
            options={"pattern": "suffix"},
            coast=1.0,
        ),
        "sometimes, coasting": _engine(
            "a window of .9 in some steps, exact in others; what is dropped steps along its moments",
            options=lambda: {"pattern": Sometimes(WindowPattern(), 0.9)},
            coast=1.0,
        ),
        "sometimes suffix, coasting": _engine(
            "all below a depth (.9) in some steps, exact in others; what is dropped steps along its moments",
            options=lambda: {"pattern": Sometimes(LowestPattern(), 0.9)},
            coast=1.0,
        ),
        "window, controlled": _engine(
            "a window whose rate keeps the added variance at a quarter", options=window, control=0.25
        ),
        # ---- other ways to spend less
        "freezing": Method(Freezing, "the lowest layers are not trained; with LoRA they have no updates"),
        "freezing, same size": Method(
            lambda model, setting: Freezing(model, setting, same_size=True),
            "with LoRA, the other layers have so much higher a rank that as many parameters are trained as without",
        ),
        "FreezeOut": Method(FreezeOut, "layers end their training in turn, the lowest first (Brock et al., 2017)"),
        "FreezeOut, scaled": Method(
            lambda model, setting: FreezeOut(model, setting, scaled=True),
            "the same, with higher rates the earlier they end",
        ),
        "LISA": _engine(
            "weights of few layers are trained at a time, others every 20 steps (Pan et al., NeurIPS 2024)",
            options={"policy": "lisa"},
        ),
        "stochastic depth": Method(
            lambda model, setting: Skipping(model, setting, progressive=False),
            "layers are skipped (Huang et al., 2016)",
        ),
        "PLD": Method(
            lambda model, setting: Skipping(model, setting, progressive=True),
            "layers are skipped, more and more (Zhang and He, 2020)",
        ),
        "top tokens": Method(Tokens, "every branch's backward is over the tokens with the largest gradients"),
        "sampled tokens": Method(
            lambda model, setting: Tokens(model, setting, sampled=True),
            "the same, drawn in proportion to them and scaled: unbiased",
        ),
        "nested batch": Method(
            NestedBatch, "the lower half of the layers is trained on a part of each batch: unbiased"
        ),
        "nested batch, gradual": Method(
            lambda model, setting: NestedBatch(model, setting, gradual=True), "a larger part the higher the layer"
        ),
        "smaller batch": Method(SmallerBatch, "exact steps on a part of each batch"),
        "selective": Method(Selective, "a step on the windows of largest loss (Jiang et al., 2019)"),
    }
