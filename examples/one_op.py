"""Use one op in a plain PyTorch module: MLP layers that share two weight banks.

    python examples/one_op.py [--steps N] [--width D]

Layer i is slot i of both banks. Backward adds into that slot of a gradient bank, instead of making a
zero-filled gradient of the whole bank for every layer.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from pgolf_fast import ops


class BankMLP(nn.Module):
    """Residual MLP layers, x + down(leaky_relu(up(x))^2), from two banks."""

    def __init__(self, layers: int, width: int, hidden: int):
        super().__init__()
        self.up = nn.Parameter(torch.randn(layers, hidden, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(layers, width, hidden) * hidden**-0.5)
        self.up_grad, self.down_grad = torch.zeros_like(self.up), torch.zeros_like(self.down)
        self.up.grad, self.down.grad = self.up_grad, self.down_grad  # the optimizer reads the same memory

    def forward(self, x: Tensor) -> Tensor:
        grads = {"grad_up": self.up_grad, "grad_down": self.down_grad}
        for slot in range(len(self.up)):
            x = x + ops.mlp(x, self.up, self.down, slot, "leaky_relu_squared", **grads)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--width", type=int, default=64, help="width of a layer")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = BankMLP(layers=4, width=options.width, hidden=2 * options.width)
    compiled = torch.compile(model, fullgraph=True)  # the op is one node of the graph
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(256, options.width)
    targets = inputs.flip(1)
    for step in range(options.steps):
        optimizer.zero_grad(set_to_none=False)  # clear the gradient banks before forward, and keep them
        loss = (compiled(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
