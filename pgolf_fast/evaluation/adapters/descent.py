"""Adapters that train the model's own parameters: SGD and AdamW."""

import math
from abc import abstractmethod
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.adapters.base import Learner, Scored, Tensors, adamw_, freeze
from pgolf_fast.model.bank import BANK_NAMES, Banks, Transform, make_banks, transformed
from pgolf_fast.model.compiled import CapturedStep, compiled
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import fake_int6


def trainable_parameters(model: GPT, config: TTTConfig) -> list[nn.Parameter]:
    """Return the parameters that adapt under `TTTConfig.parameters`; in banks, only `moving_slots` do."""
    if config.parameters == "banks":
        return model.bank_parameters()
    if config.parameters == "mlps":
        return [model.mlp_up_bank, model.mlp_down_bank]
    frozen = tuple(f"blocks.{i}." for i in range(config.freeze_blocks))
    names = ("",) if config.parameters == "all" else (*BANK_NAMES, "blocks.", "skip_", "parallel_")
    named = model.named_parameters()
    return [p for name, p in named if name.startswith(names) and not name.startswith(frozen)]


def moving_slots(tensor: Tensor, num_layers: int, frozen: int) -> list[Tensor]:
    """Return views of a bank (slots, rows, columns) without the slots of the first `frozen` blocks.

    Any other tensor is one view, and so is a bank in which nothing is frozen.
    """
    if not frozen or tensor.ndim < 3:
        return [tensor]
    return [tensor[first + frozen : first + num_layers] for first in range(0, len(tensor), num_layers)]


def chunk_lr(config: TTTConfig, chunk: int, chunks: int) -> float:
    """Return a chunk's learning rate: constant, or a half cosine over chunks from `config.lr` to zero."""
    if config.decay == "constant":
        return config.lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


class Descent(Learner):
    """Clipped gradient steps on the parameters of a `borrowed` model (PR 1501).

    Each chunk is passed over `epochs` times in batches of sequences, in order, without a shorter last one.
    Optimizer state is kept across chunks. Forward reads copies made at each update. Nothing waits for a GPU.
    """

    MOMENTS: tuple[str, ...]
    """Optimizer state of each parameter by name: tensors of its shape that start at zero."""

    def __init__(
        self,
        model: GPT,
        config: TTTConfig,
        seq_len: int,
        grid: Transform = fake_int6,
        *,
        compile: bool = False,
        cuda_graph: bool = False,
    ):
        """Round banks to `grid` if `config.quantize_forward` says so; `cuda_graph` replays each update."""
        self.model, self.config, self.seq_len = model, config, seq_len
        self._grid = grid if config.quantize_forward == "banks" else None
        masters, adapting = model.bank_parameters(), trainable_parameters(model, config)
        freeze(model)
        for parameter in (*adapting, *masters):  # gradient banks are all given or all None
            parameter.grad = torch.zeros_like(parameter)
        for parameter in adapting:
            parameter.requires_grad_()
        slots = partial(moving_slots, num_layers=model.config.num_layers, frozen=config.frozen_slots)
        self._parameters = [part for p in adapting for part in slots(p.detach())]
        self._grads = [part for p in adapting if p.grad is not None for part in slots(p.grad)]
        self.trainable, self.updates = sum(p.numel() for p in self._parameters), 0
        self._moments = {name: [torch.zeros_like(p) for p in self._parameters] for name in self.MOMENTS}
        self._lr, self._step_number = torch.zeros(2, device=model.qo_bank.device).unbind()
        copied = self._grid is not None or any(m.dtype != model.compute_dtype for m in masters)
        self._weights = [m.detach().to(model.compute_dtype, copy=copied) for m in masters]
        self._refresh()
        self._banks = make_banks(self._weights, [m.grad for m in masters if m.grad is not None])
        self._loss = compiled(model.loss) if compile else model.loss
        self._token_losses = compiled(model.token_losses) if compile else model.token_losses
        self._captured: dict[torch.Size, CapturedStep[None]] | None = {} if cuda_graph else None

    @abstractmethod
    def _rule(self, parameters: Tensors, grads: Tensors, moments: list[Tensors], divisor: Tensor) -> None:
        """Update parameters of one dtype in place by their gradients divided by `divisor`."""

    def banks(self) -> Banks:
        """Return the banks that forward reads now."""
        return Banks(*self._weights)

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        losses = self._token_losses if len(tokens) > 1 else self.model.token_losses
        with torch.no_grad():
            return losses(tokens, targets, self.banks(), context=context)

    def adapt(self, scored: Scored) -> None:
        (tokens,) = scored.tokens
        sequences = (len(tokens) - 1) // self.seq_len
        x, y = (tokens[i : i + sequences * self.seq_len].view(-1, self.seq_len) for i in (0, 1))
        self._lr.fill_(chunk_lr(self.config, scored.index, scored.count))
        step = self.config.batch_seqs
        for _ in range(self.config.epochs):
            for first in range(0, sequences, step):
                self._run(x[first : first + step], y[first : first + step])
                self.updates += 1

    def _run(self, x: Tensor, y: Tensor) -> None:
        if self._captured is None:
            return self._update(x, y)
        if x.shape not in self._captured:
            moments = chain(*self._moments.values())
            changed = [*self._parameters, *self._grads, *moments, *self._weights, self._step_number]
            self._captured[x.shape] = CapturedStep(self._update, (x, y), changed)
        self._captured[x.shape](x, y)

    def _update(self, x: Tensor, y: Tensor) -> None:
        self._loss(x, y, self._with_projections()).backward()
        self._step()
        self._refresh()

    def _with_projections(self) -> Banks:
        """Return the banks to train on; "projections" also rounds embedding projections (PR 1501)."""
        if self.config.quantize_forward != "projections":
            return self._banks
        modules = self.model.bigram, self.model.ve_shared
        ngram, value = (None if module is None else fake_int6(module.proj.weight) for module in modules)
        return replace(self._banks, ngram_projection=ngram, value_projection=value)

    @torch.no_grad()
    def _step(self) -> None:
        """Clip to the global norm and update, with one fused call for the parameters of each dtype."""
        norms = [norm.float() for norm in torch._foreach_norm(self._grads)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        # norm / limit where that is above 1; the fused rules divide gradients by it
        divisor = ((norm + 1e-6) / (self.config.grad_clip or math.inf)).clamp_min_(1.0)
        self._step_number += 1
        for dtype in {p.dtype for p in self._parameters}:
            own = [i for i, p in enumerate(self._parameters) if p.dtype == dtype]
            every = (self._parameters, self._grads, *self._moments.values())
            parameters, grads, *moments = [[tensors[i] for i in own] for tensors in every]
            self._rule(parameters, grads, moments, divisor)
        torch._foreach_zero_(self._grads)

    @torch.no_grad()
    def _refresh(self) -> None:
        masters = list(self.model.bank_parameters())
        for weight, fresh in zip(self._weights, transformed(masters, self._grid), strict=True):
            if weight.data_ptr() != fresh.data_ptr():
                weight.copy_(fresh)

    def _lists(self) -> dict[str, Tensors]:
        return {**self._moments, "parameter": self._parameters}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self._step_number.fill_(self.updates)
        self._refresh()


class SGD(Descent):
    """Stochastic gradient descent with momentum, as run in PR 1501."""

    MOMENTS = ("momentum",)

    def _rule(self, parameters: Tensors, grads: Tensors, moments: list[Tensors], divisor: Tensor) -> None:
        buffers = moments[0] if self.config.momentum else []
        rule: dict[str, Any] = {"momentum": self.config.momentum, "lr": self._lr, "grad_scale": divisor}
        rule |= {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
        # zero momentum gives the same first step
        torch._fused_sgd_(parameters, grads, buffers, **rule, is_first_step=False)


class AdamW(Descent):
    """Adam with decoupled weight decay (Kingma and Ba 2014; Loshchilov and Hutter 2017)."""

    MOMENTS = ("mean", "square")

    def _rule(self, parameters: Tensors, grads: Tensors, moments: list[Tensors], divisor: Tensor) -> None:
        adamw_((parameters, grads, *moments), self._step_number, self.config, self._lr, divisor)
