"""``dropbp-fx doctor``: what is installed, which private hooks PyTorch has, and whether dropping works here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import dropbp_fx
from dropbp_fx import _torch
from dropbp_fx.entry import dropbp_backend

_OPTIONAL = ("triton", "transformers", "peft", "pandas", "jinja2", "matplotlib", "pydot")


def report() -> tuple[str, bool]:
    """The report as text, and whether everything that training needs is in order."""
    lines = [tabulate(list(_versions()), tablefmt="plain"), ""]
    missing = [name for name, found in _torch.hooks().items() if not found]
    total = len(_torch.hooks())
    lines.append(f"hooks      {total - len(missing)} of {total} private hooks of PyTorch found")
    lines += [f"           missing: {name}" for name in missing]
    healthy = not missing
    for name, check in (("aot_eager", True), ("inductor", _compiler() is not None)):
        if not check:
            lines.append(f"{name:<10} not checked: there is no C++ compiler. Install g++, or set CXX.")
            continue
        started = time.perf_counter()
        problem = self_check(name)
        took = time.perf_counter() - started
        healthy &= problem is None
        verdict = "gradients and None gradients agree with eager" if problem is None else f"FAILED: {problem}"
        lines.append(f"{name:<10} {verdict} ({took:.1f} s)")
    if not healthy:
        lines += [
            "",
            "Something is wrong. dropbp_fx is checked with torch 2.11, 2.13 and 2.15; please report the above.",
        ]
    return "\n".join(lines), healthy


def _versions() -> Iterator[tuple[str, str]]:
    yield "dropbp_fx", dropbp_fx.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", str(torch.__version__)
    yield "GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield "C++", _compiler() or "none"
    for name in _OPTIONAL:
        yield name, _version(name)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str | None:
    return next((name for name in (os.environ.get("CXX", "g++"), "clang++") if shutil.which(name)), None)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def self_check(inner: Any) -> str | None:
    """Compare two of three branches dropped with an eager model that detaches them; what is wrong, or ``None``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(_Block(), _Block(), _Block())
        x = torch.randn(4, 8)
    expected_loss = _eager(model, x, dropped={0, 2})
    expected = torch.autograd.grad(expected_loss, list(model.parameters()), allow_unused=True)
    backend = dropbp_backend(0.5, inner=inner, seed=0)
    try:
        run = torch.compile(model, backend=backend)
        with backend.pinned([0, 2]):
            loss = run(x).square().sum()
        loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if not torch.allclose(loss, expected_loss, rtol=1e-4):
        return f"the loss is {loss.item():g}, eager has {expected_loss.item():g}"
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        if (parameter.grad is None) != (gradient is None):
            return f"{name} {'lacks a gradient' if parameter.grad is None else 'has a gradient'}, unlike in eager"
        if gradient is not None and not torch.allclose(_grad(parameter), gradient, rtol=1e-3, atol=1e-5):
            return f"the gradient of {name} differs from eager's"
    return None


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _eager(model: nn.Sequential, x: Tensor, dropped: set[int]) -> Tensor:
    for index, block in enumerate(model):
        y = block(x)
        x = x + (y - x).detach() if index in dropped else y
    return x.square().sum()
