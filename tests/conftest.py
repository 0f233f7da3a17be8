from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from torch.optim import optimizer

from dropbp_fx import _torch
from dropbp_fx.runtime.compiler import Compiler
from tests.graphs import Replayed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="run the tests on this device: cpu (default) or cuda")
    parser.addoption(
        "--graphs", action="store_true", help="regions run as CUDA graphs; on the CPU as a stand-in for them"
    )


def pytest_configure(config: pytest.Config) -> None:
    # pytest puts handlers on loggers that do not propagate. On this one they would mean that somebody reads PyTorch's
    # structured trace: every graph of every test would be printed, and every artifact of this package made.
    logging.getLogger("torch.__trace").propagate = True
    if (
        config.getoption("--device") != "cpu"
    ):  # a default device is a mode that every call goes through, also while tracing
        torch.set_default_device(config.getoption("--device"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long starts first: a worker that starts it last would end long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None and item.get_closest_marker("inductor") is None)


def pytest_collection_finish() -> None:
    """The garbage collector need not look at what imports have made: half a million objects, at every tenth test or so."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _guards_not_timed() -> Iterator[None]:
    """Dynamo times the guards of whatever it compiles, for its statistics, with the processor's caches flushed first: a
    tenth of the time that a small model takes to compile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _graphs_wanted(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--graphs"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiler, "cuda_graphs", True)
        if request.config.getoption("--device") == "cpu":
            patch.setattr(_torch, "graph_capture", lambda _device: Replayed())
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_backends_left_over() -> Iterator[None]:
    """What watches for a backend does so while it lives, be it only in a reference cycle."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _no_hooks_left_over() -> None:
    """A backend that nobody calls says so in other people's optimizer steps while it lives, be it only in a reference cycle,
    such as that of a caught error and its traceback.
    """
    optimizer._global_optimizer_post_hooks.clear()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Every test compiles from scratch and with its own random streams."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
