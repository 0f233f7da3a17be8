"""``dump_graphs``, the structured trace and the log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dropbp_fx
from dropbp_fx import dropbp_backend
from tests.matrix import family
from tests.test_models import ResidualMLP, X, language_loss, square_loss

pytestmark = pytest.mark.thorough


def boxed(gm: torch.fx.GraphModule, _inputs: Any) -> Any:
    from functorch.compile import make_boxed_func

    return make_boxed_func(gm.forward)


def dump(directory: Path, inner: Any, model: torch.nn.Module | None = None, loss: Any = square_loss) -> set[str]:
    backend = dropbp_backend(0.5, inner=inner, seed=0)
    run = torch.compile(model or ResidualMLP(), backend=backend)
    with dropbp_fx.dump_graphs(directory) as root:
        loss(run).backward()
        backend.warmup()
    assert root == directory
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "inner",
    ["aot_eager", (boxed, boxed), pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])],
    ids=["aot_eager", "pair", "inductor"],
)
def test_every_stage_is_there_for_every_inner_compiler(tmp_path: Path, inner: Any) -> None:
    found = dump(tmp_path / "graphs", inner)
    first = "graph0/region01_blocks.0"
    assert {
        "graph0/dynamo.py",
        "graph0/regions.txt",
        "graph0/region00_no_branch/keeps_all/forward.py",
        f"{first}/region.py",
        f"{first}/joint.py",
        f"{first}/keeps_all/joint.py",
        f"{first}/keeps_all/forward.py",
        f"{first}/keeps_all/backward.py",
        f"{first}/forward_only/forward.py",
    } <= found
    assert not any("region02" in name for name in found), "identical regions are written once"
    read = {name: (tmp_path / "graphs" / name).read_text() for name in found}
    assert read["graph0/dynamo.py"].count("dropbp_fx.gate") >= 3
    assert "gate_backward" in read[f"{first}/joint.py"]
    for stage in ("joint", "forward", "backward"):
        assert "gate" not in read[f"{first}/keeps_all/{stage}.py"]
        assert "mm" in read[f"{first}/keeps_all/{stage}.py"]
    assert "tangents" not in read[f"{first}/forward_only/forward.py"]
    assert "region 3: blocks.2; code of graph0/region01_blocks.0" in read["graph0/regions.txt"]


def test_parallel_branches_have_a_folder_for_each_variant(tmp_path: Path) -> None:
    found = dump(tmp_path, "aot_eager", family("GPT-NeoX").build(), language_loss)
    layer = next(name.split("/joint.py")[0] for name in found if name.endswith("mlp/joint.py") and "drops" not in name)
    names = layer.partition("_")[2].split("+")
    assert names == ["gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp"]

    def products(variant: str) -> int:
        (backward,) = [
            name for name in found if name.startswith(f"{layer}/{variant}") and name.endswith("/backward.py")
        ]
        return (tmp_path / backward).read_text().count("aten.mm")

    kept = products("keeps_all")
    assert 0 < products(f"drops_{names[0]}") < kept
    assert 0 < products(f"drops_{names[1]}") < kept


def test_training_is_the_same_while_dumping(tmp_path: Path) -> None:
    gradients = []
    for dumping in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = ResidualMLP()
        backend = dropbp_backend(0.5, inner="aot_eager", seed=3)
        run = torch.compile(model, backend=backend)
        if dumping:
            with dropbp_fx.dump_graphs(tmp_path):
                square_loss(run).backward()
        else:
            square_loss(run).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert backend.stats.compiled_variants == 4
    for plain, dumped in zip(*gradients, strict=True):
        assert (plain is None) == (dumped is None)
        assert plain is None or torch.equal(plain, dumped)


def test_a_second_model_does_not_overwrite_the_first(tmp_path: Path) -> None:
    dump(tmp_path, "aot_eager")
    before = (tmp_path / "graph0" / "dynamo.py").read_text()
    torch._dynamo.reset()
    found = dump(tmp_path, "aot_eager", ResidualMLP(width=8))
    assert (tmp_path / "graph0" / "dynamo.py").read_text() == before
    assert "graph0/dynamo_2.py" in found


def test_threads_dump_apart(tmp_path: Path) -> None:
    def train(directory: Path | None, width: int) -> None:
        run = torch.compile(ResidualMLP(width=width), backend=dropbp_backend(0.5, inner="aot_eager"))
        if directory is None:
            square_loss(run).backward()
            return
        with dropbp_fx.dump_graphs(directory):
            square_loss(run).backward()

    threads = [
        threading.Thread(target=train, args=(where, width))
        for where, width in ((tmp_path / "a", 16), (tmp_path / "b", 24), (None, 32))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, width, other in (("a", 16, 24), ("b", 24, 16)):
        texts = [path.read_text() for path in (tmp_path / name).rglob("region.py")]
        assert any(f"f32[5, {width}]" in text or f"[5, {width}]" in text for text in texts), name
        assert not any(f"[5, {other}][{other}" in text or "[5, 32]" in text for text in texts), name


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NotADirectoryError, match="writes to a directory, and .*file' is a file. Give another name"),
        dropbp_fx.dump_graphs(tmp_path / "file"),
    ):
        pass


def test_artifacts_go_to_the_structured_trace() -> None:
    records: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            metadata = getattr(record, "metadata", {})
            if "artifact" in metadata:
                records.append((metadata["artifact"]["name"], getattr(record, "payload", "") or ""))

    trace = logging.getLogger("torch.__trace")
    handler = Keep()
    trace.addHandler(handler)
    try:
        square_loss(torch.compile(ResidualMLP(), backend=dropbp_backend(0.5, inner="aot_eager"))).backward()
    finally:
        trace.removeHandler(handler)
    names = {name for name, _ in records}
    assert {"dropbp_fx_graph0_dynamo.py", "dropbp_fx_graph0_region01_blocks.0_keeps_all_backward.py"} <= names
    assert all(payload for name, payload in records if name.startswith("dropbp_fx"))


def test_tlparse_s_trace_file_holds_the_artifacts(tmp_path: Path) -> None:
    script = """
import torch
from dropbp_fx import dropbp_backend
from tests.test_models import ResidualMLP, square_loss
square_loss(torch.compile(ResidualMLP(), backend=dropbp_backend(0.5, inner="aot_eager"))).backward()
"""
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+dropbp_fx"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = tmp_path.glob("*.log")
    lines = [line.partition("]")[2] for line in log.read_text().splitlines() if '"artifact"' in line]
    names = {json.loads(line[line.index("{") :])["artifact"]["name"] for line in lines}
    assert "dropbp_fx_graph0_dynamo.py" in names
    assert "residual branch blocks.0 in layer" in done.stderr, "TORCH_LOGS turns the log on"


def test_the_log_says_what_was_found_and_why_an_add_was_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    class Biased(ResidualMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + x.cos())

    with caplog.at_level("DEBUG", logger="dropbp_fx"):
        torch.compile(Biased(), backend=dropbp_backend(0.5, inner="aot_eager"))(X)
    assert "residual branch blocks.2 in layer" in caplog.text
    assert "is no residual branch: neither summand is computed from the other by a matrix product" in caplog.text
