"""Averages of the weights during training: EMA, and SWA over snapshots of the EMA (PR 1501)."""

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import AverageConfig
from pgolf_fast.model.weights import Tensors


class WeightAverage:
    """A float32 EMA of every parameter, and the running mean of its late snapshots."""

    def __init__(self, model: nn.Module, config: AverageConfig):
        self.config = config
        self._parameters = dict(model.named_parameters())
        self.ema = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self.swa: dict[str, Tensor] = {}
        self.swa_count = 0

    @torch.no_grad()
    def update(self, step: int, multiplier: float) -> None:
        """Update after optimizer step number `step` (from 1), which used this learning-rate multiplier."""
        c = self.config
        if step % c.ema_every == 0:
            # one foreach call for all parameters instead of hundreds; decayed for every step since the last
            weights = [p.detach().float() for p in self._parameters.values()]
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - c.ema_decay**c.ema_every)
        if c.swa_every is not None and multiplier < c.swa_below and step % c.swa_every == 0:
            self.swa_count += 1
            if not self.swa:
                self.swa = {name: value.clone() for name, value in self.ema.items()}
            else:
                torch._foreach_lerp_(list(self.swa.values()), list(self.ema.values()), 1 / self.swa_count)

    def final(self) -> dict[str, Tensor]:
        """Return the final weights: the mean of the EMA snapshots if they are applied, else the EMA."""
        return self.swa if self.config.swa_apply and self.swa_count else self.ema

    def state(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        return tensors | {f"swa.{name}": value for name, value in self.swa.items()}

    def load_state(self, state: Tensors, swa_count: int) -> None:
        """Invert `state`."""
        self.swa_count = swa_count
        for name in self.ema:
            self.ema[name].copy_(state[f"ema.{name}"])
        saved = self.ema.items() if swa_count else ()
        self.swa = {name: state[f"swa.{name}"].to(value.device, copy=True) for name, value in saved}
