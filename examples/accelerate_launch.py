"""Train with DropBP under Hugging Face Accelerate.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_launch.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_launch.py

Accelerate wraps the model in DistributedDataParallel, which must be told to look for missing gradients. The model is
compiled in place before Accelerate gets it. Needs the package accelerate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dropbp_fx import dropbp_backend
from dropbp_fx.distributed import all_reduce_present, check_ranks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, width: int = 128, layers: int = 6) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(32, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    arguments = parser.parse_args(given)

    torch._dynamo.config.optimize_ddp = False  # its cuts would go through branches
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(0)
    model = Model()
    backend = dropbp_backend(rate=0.5, seed=0, inner=arguments.inner)
    model.compile(backend=backend)

    inputs = torch.randn(4096, 32)
    data = DataLoader(TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True)), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.register_comm_hook(None, all_reduce_present)  # optional: no zeros are sent for dropped branches
    accelerator.register_for_checkpointing(backend)  # its state goes into every checkpoint of accelerator.save_state()

    step = 0
    while step < arguments.steps:
        for x, y in data:
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                mean = accelerator.reduce(loss.detach(), "mean").item()
                accelerator.print(f"step {step}: loss {mean:.4f}, dropped {backend.stats.realised_rate:.3f}")
            if step == arguments.steps:
                break
    check_ranks(backend)
    accelerator.end_training()


if __name__ == "__main__":
    main()
