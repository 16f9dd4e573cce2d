"""Parts of a micro-batch that CPU threads train side by side."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf_fast.model.bank import Banks, make_banks
from pgolf_fast.model.gpt import GPT

LossFunction = Callable[[Tensor, Tensor, Banks], Tensor]


class _Share(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor | None, ...]  # of the parameters outside the banks
    bank_gradients: list[Tensor]


class Shares:
    """Adds the gradients of `scale * loss` of a micro-batch as MicroStep does, in `count` equal parts.

    Each part is computed by one thread, and their gradients are added in order: results depend on `count`,
    not on the number of threads. Threads meet once a micro-batch, not in every operation.
    """

    def __init__(self, model: GPT, scale: float, count: int):
        self.model, self.scale, self.count = model, scale / count, count
        banks = {id(bank) for bank in model.bank_parameters()}
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in banks]
        threads = min(count, torch.get_num_threads())
        self._pool = ThreadPoolExecutor(threads, "share")

    def __call__(self, loss_function: LossFunction, tokens: Tensor, targets: Tensor, banks: Banks) -> Tensor:
        given = [b.grad for b in self.model.bank_parameters() if b.grad is not None]
        threads = torch.get_num_threads()

        def share(number: int, tokens: Tensor, targets: Tensor) -> _Share:
            # A thread's first operation takes over the last number set anywhere: ask, which counts as one
            if torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            received = [torch.zeros_like(g) for g in given] if number else given
            own = make_banks(list(banks.weights()), received)
            loss = loss_function(tokens, targets, own)
            inputs = [*self._others, *own.weights()]  # the latter receive None: ops add to the gradient banks
            gradients = torch.autograd.grad(loss * self.scale, inputs, allow_unused=True)
            return _Share(loss.detach(), gradients[: len(self._others)], received)

        parts = zip(range(self.count), tokens.chunk(self.count), targets.chunk(self.count), strict=True)
        jobs: list[Future[_Share]] = []
        try:
            for part in parts:
                jobs.append(self._pool.submit(share, *part))
            shares = [job.result() for job in jobs]
        finally:
            wait(jobs)  # also after an exception or a signal: none may add gradients later
            torch.set_num_threads(threads)  # the pool's threads have set what new threads begin with
        for number, done in enumerate(shares):
            if number:
                torch._foreach_add_(given, done.bank_gradients)
            for parameter, gradient in zip(self._others, done.gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return torch.stack([done.loss for done in shares]).mean()
