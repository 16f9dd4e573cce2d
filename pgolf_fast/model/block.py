"""The parameters of a block that are not in a bank, and the gates of its heads."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast.config.schema import ModelConfig


class Attention(nn.Module):
    """The gains of queries, and the gates of heads if there are any."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self._kind, self._scale = config.head_gate, config.gate_scale
        if width := config.head_gate_width:
            self.attn_gate_w = nn.Parameter(torch.zeros(config.num_heads, width))

    def gate(self, x: Tensor, queries: Callable[[int], Tensor]) -> Tensor | None:
        """Return the factor of each head's output, (B, W, H), or None without gates.

        x (B, W, D) is the normalized input; `queries(n)` returns n channels of its query projection.
        """
        if self._kind is None:
            return None
        width = self.attn_gate_w.shape[1]
        source = queries(width) if self._kind == "output_q" else x[..., :width]
        raw = F.linear(source, self.attn_gate_w.to(x.dtype))
        if self._kind == "sparse":
            return torch.sigmoid(self._scale * raw)
        return torch.sigmoid(raw) if self._kind == "dense" else 2 * torch.sigmoid(raw)


class Block(nn.Module):
    """The parameters of one block that are not in a bank."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        dim = config.model_dim
        self.attn = Attention(config)
        self.attn_scale = nn.Parameter(torch.full((dim,), 1.0 if layer else config.first_attn_scale))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.ones(2, dim))
        self.resid_mix.data[1] = 0
        self.layer_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
