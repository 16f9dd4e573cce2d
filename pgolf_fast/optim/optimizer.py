"""The optimizer of each parameter: Muon for the banks, AdamW for tables and everything small."""

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import OptimConfig
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import Tensors
from pgolf_fast.ops.reference import POLAR_EXPRESS
from pgolf_fast.optim.muon import Muon, Parameters


class Optimizer:
    """All parameters of a GPT, updated with one learning-rate multiplier (PR 1501).

    `extra` are named parameters outside the model that are trained like its small ones: clipped with them,
    and updated by AdamW at the steps that gave them a gradient.
    """

    def __init__(
        self, model: GPT, config: OptimConfig, world: World = SINGLE, extra: Parameters | None = None
    ):
        self.config, self.model, self._extra = config, model, extra or {}
        self._named = {**dict(model.named_parameters()), **self._extra}
        self.parameters = list(self._named.values())
        banks = {name: self._named[name] for name in BANK_NAMES}
        self.muon = Muon(
            banks,
            weight_decay=config.weight_decay,
            newton_schulz_steps=config.muon_newton_schulz_steps,
            coefficients=POLAR_EXPRESS if config.muon_polar_express else None,
            row_norm=config.muon_row_norm,
            world=world,
        )
        tables = model.tables()
        assigned = {id(p) for p in (*tables, *model.bank_parameters())}
        scalars = [p for p in self.parameters if id(p) not in assigned]
        # one group per table: tables may be bfloat16, and the fused kernel wants one dtype in a group
        embed, scalar = ({} if w is None else {"weight_decay": w} for w in config.adam_decays)
        groups: list[dict] = [{"params": [table], "base_lr": config.embed_lr, **embed} for table in tables]
        groups.append({"params": scalars, "base_lr": config.scalar_lr, **scalar})
        betas, eps, decay = (config.adam_beta1, config.adam_beta2), config.adam_eps, config.weight_decay
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=decay, fused=True)

    def muon_momentum(self, step: int) -> float:
        """Return Muon's momentum: a linear warm-up, then constant (PR 1501)."""
        c = self.config
        if step >= c.muon_momentum_warmup_steps:
            return c.muon_momentum
        share = step / c.muon_momentum_warmup_steps
        return (1 - share) * c.muon_momentum_start + share * c.muon_momentum

    def gradients(self) -> list[Tensor]:
        """Return every gradient there is."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def clip(self) -> Tensor:
        """Scale all gradients to a global norm of at most grad_clip; return the norm before, ()."""
        norm = nn.utils.get_total_norm(self.gradients())
        if self.config.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        return norm

    def step(self, step: int, multiplier: float) -> None:
        """Update every parameter from its gradient."""
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        self.adamw.step()
        written, lr = self.model.current_shadows(), self.config.matrix_lr * multiplier
        shadows = None if written is None else dict(zip(BANK_NAMES, written, strict=True))
        self.muon.step(lr=lr, momentum=self.muon_momentum(step), shadows=shadows)
        if shadows is not None:
            self.model.shadows_written()

    def zero_grad(self) -> None:
        """Clear the model's gradients in place and drop those of extra parameters."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # in place: captured graphs need gradient banks at their addresses
        for parameter in self._extra.values():
            parameter.grad = None  # AdamW skips a parameter without a gradient

    def state(self) -> dict[str, Tensor]:
        """Return every optimizer tensor by name."""
        tensors = self.muon.state()
        for name, parameter in self._named.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"adamw.{key}.{name}"] = value
        return tensors

    def load_state(self, state: Tensors) -> None:
        """Invert `state`."""
        self.muon.load_state(state)
        self.adamw.state.clear()
        for place, value in state.items():
            if place.startswith("adamw."):
                _, key, name = place.split(".", 2)
                parameter = self._named[name]
                # a copy on the parameter's device: a checkpoint is read on the CPU
                self.adamw.state[parameter][key] = value.to(parameter.device, copy=True)
