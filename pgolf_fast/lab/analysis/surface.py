"""Error surface: the line between two models, published proxies, and the curvature of the loss.

The ops' backward passes are not differentiable, so a Hessian-vector product is a difference of two gradients
in float64: at the weights, which all products share, and at a distance of 1e-9 of their norm. On `small` and
one window, the relative error of v^T H v was 1.5e-6 along the top eigenvector and 1e-7 along a random vector;
central differences with a step of 1e-6 had 1e-3 along the former.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.bench.drawing import Axes, label
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import CPU_TOKENS
from pgolf_fast.lab.analysis import geometry
from pgolf_fast.lab.analysis.losses import score_plain
from pgolf_fast.lab.analysis.models import LoadedModel, Validation, diverged, measure, validation_or_why
from pgolf_fast.lab.analysis.summary import Options, Summary, columns, draw, draw_bars, ratio, tabulate
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT

STEP = 1e-9
OTHERS = "others"
LARGEST = 3  # Hessian eigenvalues from the top
CONVERGED = 0.1  # residual, relative to an eigenvalue, above which the eigenvalue gets a question mark
Product = Callable[[Tensor], Tensor]


def analyze_connectivity(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure each pair's midpoint as published, its expected norms, and, with tokens, the loss on the line.

    Raises PgolfError naming a tensor whose shapes differ, or if the options name data that cannot be read.
    """
    validation = validation_or_why(models, options)
    parts = [_connectivity(a, b, validation, options) for a, b in geometry.pairs(models)]
    return list(chain(*parts))


def _connectivity(
    a: LoadedModel, b: LoadedModel, validation: Validation | str, options: Options
) -> list[Summary]:
    name = f"loss from {a.name} to {b.name}"
    line = measure(name, validation, lambda data: [loss_on_line(a, b, name, data, options)])
    return [mode_connectivity(a, b), midpoint_norms(a, b), *line]


def analyze_surface(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Compute the published proxies and, with tokens, the Hessian's trace and extreme eigenvalues.

    Raises PgolfError if the options name data that cannot be read.
    """
    validation, name = validation_or_why(models, options), "curvature of the loss"
    return [proxies(models), *measure(name, validation, lambda data: curvature(models, data, options))]


def mode_connectivity(a: LoadedModel, b: LoadedModel) -> Summary:
    """Sum |A|, |B|, |A - B| and |(A + B) / 2| over all tensors; divide the last by the first (PR 1501)."""
    tensors = [(a.state[name], b.state[name]) for name in geometry.common((a, b))]
    sums = {
        "norm_a": sum(geometry.norm(x) for x, _ in tensors),
        "norm_b": sum(geometry.norm(y) for _, y in tensors),
        "distance": sum(geometry.norm(x - y) for x, y in tensors),
        "norm_middle": sum(geometry.norm(middle(x, y)) for x, y in tensors),
    }
    share = ratio(sums["norm_middle"], sums["norm_a"])
    header = ("sum of |A|", "sum of |B|", "sum of |A-B|", "sum of |(A+B)/2|", "ratio")
    return Summary.published(
        f"mode connectivity, {a.name} to {b.name}",
        "Shows how much shorter the average of two models is; cannot show whether they are connected, since "
        "no loss is measured and nothing supports reading 1 as one basin and less than 0.8 as two.",
        Table(header, [(*(f"{value:.2f}" for value in sums.values()), number(share, ".4f"))]),
        {**sums, "ratio": share},
    )


def midpoint_norms(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare each bank's |(A + B) / 2| / |A| with sqrt((1 + cosine) / 2), its value for equal norms."""
    values: dict[str, dict[str, float | None]] = {}
    for name in BANK_NAMES:
        x, y = a.state[name], b.state[name]
        angle = geometry.cosine(x, y)
        values[name] = {
            "cosine": angle,
            "length": ratio(geometry.norm(y), geometry.norm(x)),
            "ratio": ratio(geometry.norm(middle(x, y)), geometry.norm(x)),
            "from_cosine": None if angle is None else math.sqrt((1 + angle) / 2),
        }
    shown = columns(
        ".4f", cosine="cosine", length="|B|/|A|", ratio="|(A+B)/2|/|A|", from_cosine="sqrt((1+cosine)/2)"
    )
    return Summary(
        f"midpoint norms, {a.name} to {b.name}",
        "Shows that the published ratio repeats the cosine: sqrt((1 + cosine) / 2) for weights of equal "
        f"norm, {math.sqrt(0.5):.4f} for independent ones; cannot show more than the cosine does.",
        *tabulate(("bank",), shown, values),
    )


def middle(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() + y.double()) / 2


def loss_on_line(
    a: LoadedModel, b: LoadedModel, name: str, validation: Validation, options: Options
) -> Summary:
    """Measure the loss at points of the line, and its excess over the line between the losses of the ends.

    The barrier is the largest excess, or 0 (Entezari et al. 2022); ± is the standard error over windows.
    """
    losses = path_losses(a, b, validation, options)
    shares = np.linspace(0, 1, options.points)
    straight = (1 - shares)[:, None] * losses[0] + shares[:, None] * losses[-1]
    excess, count = losses - straight, losses.shape[1]
    means = excess.mean(1)
    errors = excess.std(1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(shares), math.nan)
    top = int(means.argmax())
    barrier = {"height": float(means[top]), "error": float(errors[top]), "at": float(shares[top])}
    values = {
        **{"targets": count * validation.seq_len, "at": shares.tolist(), "loss": losses.mean(1).tolist()},
        **{"excess": means.tolist(), "excess_error": errors.tolist(), "barrier": barrier},
    }
    points = zip(shares, values["loss"], means, errors, strict=True)
    rows = [(f"{at:.3f}", f"{loss:.4f}", f"{more:+.4f}", number(e, ".1e")) for at, loss, more, e in points]
    rows.append(("barrier", "-", f"{barrier['height']:+.4f}", number(barrier["error"], ".1e")))
    return Summary(
        name,
        f"Shows whether the loss of {values['targets']:,} validation targets rises between two models (in "
        "nats, above the straight line between their losses); a barrier cannot show that no other path "
        "avoids it, nor that the models differ in more than the order of their hidden channels.",
        Table(("share of the second", "loss", "excess", "±"), rows),
        values,
        draw("path", lambda axes: _paint_line(axes[0], values, a.name, b.name)),
    )


def path_losses(a: LoadedModel, b: LoadedModel, validation: Validation, options: Options) -> np.ndarray:
    """Return mean losses in nats at points from a to b, float64 (points, windows).

    Raises PgolfError if the two are not weights of one network, or if a loss is not finite.
    """
    if a.need_config().model != b.need_config().model:
        raise PgolfError(f"{a.name} and {b.name} are different networks: there is no line between them")
    stream = validation.stream(options.device)
    network, *ends = (m.network(validation.source.table, options.device) for m in (a, a, b))
    rows = []
    for share in np.linspace(0, 1, options.points).tolist():
        with torch.no_grad():
            for parameter, x, y in zip(*(m.parameters() for m in (network, *ends)), strict=True):
                parameter.copy_(torch.lerp(x, y, share))
        _, losses = score_plain(f"{a.name} to {b.name}", network, stream, validation.seq_len)
        rows.append(losses.reshape(-1, validation.seq_len).mean(1))
    return np.stack(rows)


def _paint_line(axes: Axes, values: dict[str, Any], first: str, second: str) -> None:
    shares, losses = values["at"], values["loss"]
    axes.errorbar(shares, losses, values["excess_error"], fmt="o-", markersize=4, label="loss")
    axes.plot([0, 1], [losses[0], losses[-1]], ":", color="0.5", label="straight line")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], [label(first), "0.25", "0.5", "0.75", label(second)])
    axes.set(ylabel="nats", title="loss on the line between the weights")
    axes.legend()


def proxies(models: Sequence[LoadedModel]) -> Summary:
    """Compute five functions of the singular values of each bank, flattened to one row per slot (PR 1502)."""
    values = {m.name: {bank: _proxies(m.state[bank]) for bank in BANK_NAMES} for m in models}
    shown = columns(".4g", condition="condition", effective_rank="effective rank", trace_proxy='"trace"')
    shown += columns(".4g", gap="gap", top_energy=f"top {geometry.ENDS} energy")
    return Summary.published(
        "error surface by proxies",
        "Shows five functions of a flattened bank's singular values; cannot show anything about the error "
        'surface, since they depend on no loss and no data (the "trace" is the squared norm of the weights).',
        *tabulate(("model", "bank"), shown, values),
    )


def _proxies(bank: Tensor) -> dict[str, float | None]:
    sigma = geometry.singular_values(geometry.flattened(bank))
    squares = sigma.square()
    total, gap = float(squares.sum()), float(sigma[0] - sigma[1]) if len(sigma) > 1 else None
    ranks = {"condition": geometry.condition(sigma), "effective_rank": geometry.effective_rank(sigma)}
    top = ratio(float(squares[: geometry.ENDS].sum()), total)
    return {**ranks, "trace_proxy": total, "gap": gap, "top_energy": top}


def curvature(models: Sequence[LoadedModel], validation: Validation, options: Options) -> list[Summary]:
    """Measure loss, gradient, Hessian trace (total and by bank) and extreme Hessian eigenvalues."""
    ids = torch.from_numpy(validation.first(options.curvature_tokens)).to(options.device)
    tokens, targets = (part.view(-1, validation.seq_len) for part in (ids[:-1], ids[1:]))
    values: dict[str, Any] = {}
    for model in models:
        network = model.network(validation.source.table, options.device, torch.float64)
        surface = LossSurface(network, tokens, targets)  # differences of gradients need float64
        if not math.isfinite(surface.loss + float(surface.gradient.norm())):
            raise diverged(model.name, "loss and gradient")
        signs = random_signs(surface.size, options.seed, options.device)
        top, bottom = extremes(surface.product, next(signs), options.lanczos_steps, LARGEST)
        # Banks come first, then all other parameters
        blocks = {name: surface.blocks[name] for name in BANK_NAMES}
        blocks[OTHERS] = slice(max(place.stop for place in blocks.values()), surface.size)
        whole, parts = trace(surface.product, islice(signs, options.probes), blocks)
        values[model.name] = {
            **{"loss": surface.loss, "gradient": float(surface.gradient.norm()), "trace": asdict(whole)},
            "trace_by_part": {name: asdict(part) for name, part in parts.items()},
            "largest_eigenvalues": [asdict(value) for value in top],
            "smallest_eigenvalue": asdict(bottom),
        }
    return [_whole(values, targets.numel(), options), _by_part(values)]


def _whole(values: dict[str, Any], targets: int, options: Options) -> Summary:
    shown = columns(".4f", loss="loss") + columns(".4g", gradient="|gradient|")
    shown += columns(_with_error, trace="trace")
    shown += columns(lambda top: "; ".join(map(_eigenvalue, top)), largest_eigenvalues="largest eigenvalues")
    shown += columns(_eigenvalue, smallest_eigenvalue="smallest")
    return Summary(
        "curvature of the loss",
        f"Shows how sharply the mean loss of {targets:,} validation targets bends at the weights: the "
        f"Hessian's trace (± standard error, {options.probes} random vectors) and extreme eigenvalues by "
        f"{options.lanczos_steps} Lanczos steps (lower bounds of the largest, upper bound of the smallest; "
        "within ± the residual there is some eigenvalue, not always that one; ? means a residual above "
        f"{CONVERGED:.0%}); cannot show which model generalizes, as rescaling weights in front of a norm "
        "changes curvature but not the function.",
        tabulate(("model",), shown, values)[0],
        {"targets": targets, "models": values},
    )


def _by_part(values: dict[str, Any]) -> Summary:
    parts = {name: model["trace_by_part"] for name, model in values.items()}
    rows = [(name, part, _with_error(value)) for name, own in parts.items() for part, value in own.items()]
    heights = {name: [part["value"] for part in own.values()] for name, own in parts.items()}
    errors = {name: [part["error"] for part in own.values()] for name, own in parts.items()}
    labels = {"ylabel": "trace of the Hessian", "title": "curvature by part"}
    return Summary(
        "Hessian trace by part",
        "Shows how much of the trace belongs to each bank and to everything else (± standard error); cannot "
        "show how parts bend together, which none of these sums includes.",
        Table(("model", "part", "trace"), rows),
        parts,
        draw_bars("trace", [*BANK_NAMES, OTHERS], heights, errors, **labels),
    )


def _with_error(uncertain: dict[str, float]) -> str:
    return f"{uncertain['value']:.4g} ± {uncertain['error']:.2g}"


def _eigenvalue(uncertain: dict[str, float]) -> str:
    """Format an eigenvalue, with a question mark if more steps would still change it."""
    return _with_error(uncertain) + ("?" if uncertain["error"] > CONVERGED * abs(uncertain["value"]) else "")


class LossSurface:
    """Mean loss of fixed windows as a function of all parameters, flattened to (size,) float64."""

    def __init__(self, model: GPT, tokens: Tensor, targets: Tensor):
        """Compute loss and gradient of a float64 `model` on tokens and targets (windows, T)."""
        self._model = model
        self._parameters = list(model.parameters())
        batch = max(1, CPU_TOKENS // tokens.shape[1])
        self._batches = list(zip(tokens.split(batch), targets.split(batch), strict=True))
        self._count = targets.numel()
        ends = list(accumulate(p.numel() for p in self._parameters))
        names = (name for name, _ in model.named_parameters())
        self.size = ends[-1]
        self.blocks = dict(zip(names, map(slice, (0, *ends), ends), strict=True))
        """Range of each parameter in the vector."""
        self._step = STEP * math.sqrt(sum(float(p.detach().square().sum()) for p in self._parameters))
        model.allocate_gradient_banks()
        self.loss, self.gradient = self._loss_and_gradient()
        """Loss in nats, and gradient (size,)."""

    def product(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian by a vector (size,)."""
        step = self._step / float(vector.norm())
        weights = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for parameter, place in zip(self._parameters, self.blocks.values(), strict=True):
                parameter.add_(vector[place].view_as(parameter), alpha=step)
        ahead = self._loss_and_gradient()[1]
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)
        return (ahead - self.gradient) / step

    def _loss_and_gradient(self) -> tuple[float, Tensor]:
        self._model.zero_grad(set_to_none=False)
        total = 0.0
        for tokens, targets in self._batches:
            loss = self._model.token_losses(tokens, targets).sum() / self._count
            loss.backward()
            total += loss.item()
        parts = (torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters)
        return total, torch.cat([grad.flatten() for grad in parts])


@dataclass(frozen=True)
class Uncertain:
    """A number and its error: the standard error of a mean, or the residual of an eigenvalue."""

    value: float
    error: float


def random_signs(size: int, seed: int, device: torch.device | str) -> Iterator[Tensor]:
    """Yield vectors (size,) of independent ±1, float64, identical on every device."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, 2, (size,), generator=generator).to(device).mul(2).sub(1).double()


def trace(
    product: Product, vectors: Iterable[Tensor], blocks: Mapping[str, slice]
) -> tuple[Uncertain, dict[str, Uncertain]]:
    """Estimate the trace of a symmetric matrix and of its diagonal blocks (Hutchinson 1990).

    The mean of v^T H v over vectors v of random signs is the trace; that of v_b^T (H v)_b is that of block b.
    """
    samples: list[Tensor] = []
    for vector in vectors:
        terms = vector * product(vector)
        samples.append(torch.stack([*(terms[place].sum() for place in blocks.values()), terms.sum()]).cpu())
    stacked = torch.stack(samples)
    means, errors = stacked.mean(0).tolist(), (stacked.std(0) / math.sqrt(len(stacked))).tolist()
    *parts, whole = (Uncertain(value, error) for value, error in zip(means, errors, strict=True))
    return whole, dict(zip(blocks, parts, strict=True))


def extremes(
    product: Product, start: Tensor, steps: int, largest: int = 1
) -> tuple[list[Uncertain], Uncertain]:
    """Estimate the `largest` eigenvalues of a symmetric matrix, descending, and the smallest (Lanczos 1950).

    The k-th is at most the k-th largest eigenvalue, and the last at least the smallest. The error is the norm
    of the residual: some eigenvalue is within it, but after few steps it may be another one. There are no
    more estimates than steps. All vectors are kept orthogonal, which takes the memory of `steps` vectors.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, len(start))):
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # after one pass, a small remainder is as large as its rounding errors
            for known in basis:
                image = image - (image @ known) * known
        off_diagonal.append(float(image.norm()))
        if off_diagonal[-1] <= 1e-10 * max(map(abs, diagonal)):
            off_diagonal[-1] = 0.0  # the space is exhausted: eigenvalues are exact
            break
        basis.append(image / off_diagonal[-1])
    # eigh reads the lower triangle only
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off_diagonal[:-1], -1))
    residuals = off_diagonal[-1] * np.abs(vectors[-1])
    ascending = [Uncertain(*pair) for pair in zip(values.tolist(), residuals.tolist(), strict=True)]
    return ascending[::-1][:largest], ascending[0]
