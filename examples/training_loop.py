"""A plain PyTorch training loop with DropBP: three lines of it are about dropping.

``python examples/training_loop.py`` runs in well under a minute on a CPU and needs nothing but PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropbp_fx import dropbp_backend


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # the residual branch is found in the graph; nothing is marked by hand


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), *(Block(128) for _ in range(6)), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(4096, 32)
    targets = inputs[:, :8].prod(dim=1, keepdim=True).tanh() + inputs.sin().mean(dim=1, keepdim=True)

    # 1. Half of the branches' backward is left out over the run; which half is what a policy is about (docs/choosing.md).
    backend = dropbp_backend(rate=0.5, policy="progressive_freezing", seed=0)
    compiled = torch.compile(model, backend=backend)  # 2. as always with torch.compile

    steps = 100
    for step in range(steps):
        backend.progress = step / steps  # 3. for policies and schedules that change over the run; nothing is recompiled
        batch = torch.randint(len(inputs), (256,))
        loss = nn.functional.mse_loss(compiled(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # a dropped branch's gradients stay None: the optimizer skips them
        if step % 25 == 24:
            frozen = sum(branch.rate for branch in backend.branches) / len(backend.branches)
            print(f"step {step + 1}: loss {loss.item():.4f}, rate at this point {frozen:.3f}")

    print(f"{len(backend.branches)} branches: {', '.join(branch.name for branch in backend.branches)}")
    print(f"{backend.stats.realised_rate:.3f} of the branches were dropped over {backend.stats.forwards} forwards")
    # A checkpoint holds backend.state_dict() next to the model's: a resumed run then draws the patterns this one would.


if __name__ == "__main__":
    main()
