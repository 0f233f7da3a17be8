"""Train on several processes with DropBP, under DistributedDataParallel or FSDP2, with a checkpoint and a resume.

    torchrun --nproc-per-node 2 examples/distributed.py --engine ddp
    torchrun --nproc-per-node 2 examples/distributed.py --engine fsdp2 --steps 40 --resume

Runs on the CPU (gloo) and on GPUs (nccl, one process each) and needs nothing but PyTorch. Every rank reads its own part of
the data and drops the same branches as all others.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dropbp_fx import DropBPBackend, dropbp_backend
from dropbp_fx.distributed import (
    all_reduce_present,
    check_ranks,
    clip_grad_norm_,
    parameter_groups,
    skip_unneeded_gathers,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(32, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)  # equal weights on all ranks

    model = Model(arguments.width, arguments.layers).to(device)
    backend = dropbp_backend(rate=0.5, seed=0, inner=arguments.inner)
    backend.register(model)  # for fully_shard, under which every layer has a graph of its own
    model.compile(backend=backend)  # in place, and before the engine gets the model
    wrapped = distribute(model, arguments.engine)
    # A group a layer: under FSDP2 a new list of gradients costs the host much, and each pattern would bring one.
    optimizer = torch.optim.AdamW(parameter_groups(model, model.layers), lr=1e-3, fused=cuda)

    inputs = torch.randn(4096, 32)
    data = TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True))
    sampler = DistributedSampler(data, seed=0)  # every rank has its own part
    loader = DataLoader(data, batch_size=64, sampler=sampler, drop_last=True)

    step = load(arguments.checkpoint, model, optimizer, backend) if arguments.resume else 0
    while step < arguments.steps:
        epoch, skip = divmod(step, len(loader))
        sampler.set_epoch(epoch)
        for number, (x, y) in enumerate(loader):
            if number < skip or step == arguments.steps:
                continue
            loss = nn.functional.mse_loss(wrapped(x.to(device)), y.to(device))
            loss.backward()
            clip_grad_norm_(optimizer.param_groups, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # a dropped branch's gradients are None on every rank
            step += 1
            if step % arguments.log_every == 0:
                report(step, loss.detach(), backend)
    check_ranks(backend)  # optional: all ranks are still at one
    save(arguments.checkpoint, step, model, optimizer, backend)
    dist.destroy_process_group()


def distribute(model: Model, engine: str) -> nn.Module:
    if engine == "ddp":
        torch._dynamo.config.optimize_ddp = False  # its cuts would go through branches
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        ddp.register_comm_hook(None, all_reduce_present)  # optional: no zeros are sent for dropped branches
        return ddp
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    skip_unneeded_gathers(model)  # optional: the backward of a layer that was dropped whole reads no parameters
    return model


def report(step: int, loss: Tensor, backend: DropBPBackend) -> None:
    dist.all_reduce(loss.div_(dist.get_world_size()))
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}, dropped {backend.stats.realised_rate:.3f}", flush=True)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, backend: DropBPBackend) -> None:
    dcp.save(
        state_of(model, optimizer, json.dumps({"step": step, "dropbp": backend.state_dict()})), checkpoint_id=folder
    )


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, backend: DropBPBackend) -> int:
    state = state_of(model, optimizer, "")
    moments = {"optimizer": state.pop("optimizer")}
    dcp.load(state, checkpoint_id=folder)
    # Where a branch was dropped in every step so far, the checkpoint has no optimizer state of its parameters. Theirs stays
    # what it is here: moments of zero, and no step taken.
    for of_parameter in moments["optimizer"]["state"].values():
        of_parameter["step"].zero_()
    dcp.load(moments, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments["optimizer"])
    run = json.loads(state["run"])
    backend.load_state_dict(run["dropbp"])
    return int(run["step"])


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, run: str) -> dict[str, Any]:
    """What a checkpoint holds. The policy's state is one text: its parts come and go as branches are met."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "run": run}


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--steps", type=int, default=100, help="of the whole run, those before a resume included")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/distributed"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
