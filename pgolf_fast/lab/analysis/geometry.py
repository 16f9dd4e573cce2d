"""Distances, singular values and leading subspaces of weights, and triangles of three models.

The published forms are those of PR 1501 and PR 1502. They took every tensor of at least 65,536 elements,
which in exp101 are the four banks and the three tables, and flattened a bank to a matrix with one row per
slot. Here banks are always included, so that small models have the same rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.bench.drawing import Axes, label
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.summary import Options, Summary, columns, draw, ratio, tabulate
from pgolf_fast.model.bank import BANK_NAMES

LARGE = 65_536  # least number of elements of a tensor in the published spectra
ENDS = 5  # singular values listed from either end
MOST_DIRECTIONS = 32
ALIGNED = 0.9  # the published overlap counts directions whose cosine exceeds this
EQUILATERAL = 0.85  # the shorter sides of a near-equilateral triangle exceed this share of the longest
SAME = 1e-12  # squared distances below this share of the squared norms are rounding, without a direction


def analyze_deltas(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Compare each pair by distance and cosine: whole tensors as published, and each slot."""
    return [form(a, b) for a, b in pairs(models) for form in (deltas, slot_deltas)]


def analyze_overlap(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure principal angles of each pair: across slots as published, and within each slot."""
    return [form(a, b) for a, b in pairs(models) for form in (overlap, slot_overlap)]


def analyze_triangle(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure the sides of every triangle of models as published, and its angles."""
    common(models)
    return [form(three) for three in combinations(models, 3) for form in (triangle, angles)]


def analyze_spectra(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure singular values of flattened banks as published, and of the matrix of each slot."""
    return [spectra(models), slot_spectra(models)]


def common(models: Sequence[LoadedModel]) -> list[str]:
    """Return the names of the tensors that all models have, in the order of the first.

    Raises PgolfError naming the first tensor whose shapes differ.
    """
    first = models[0]
    names = [name for name in first.state if all(name in other.state for other in models)]
    for name, other in product(names, models):
        shape, another = tuple(first.state[name].shape), tuple(other.state[name].shape)
        if another != shape:
            text = f"{name} is {shape} in {first.name} and {another} in {other.name}"
            raise PgolfError(f"{text}: only models of one shape can be compared")
    return names


def pairs(models: Sequence[LoadedModel]) -> Iterator[tuple[LoadedModel, LoadedModel]]:
    """Yield every pair of models, in order. Raises PgolfError as `common` does."""
    common(models)
    yield from combinations(models, 2)


def large(state: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors of the published spectra: banks, and other matrices of 65,536 elements or more."""
    return [n for n, t in state.items() if n in BANK_NAMES or (t.ndim >= 2 and t.numel() >= LARGE)]


def flattened(tensor: Tensor) -> Tensor:
    """Flatten a bank to one row per slot, as the published analyses do; keep other matrices. float64."""
    return tensor.double().flatten(1)


def leading(smaller_side: int) -> int:
    """Return how many leading directions of a matrix to compare: a quarter of them, from 1 to 32."""
    return min(MOST_DIRECTIONS, max(1, smaller_side // 4))


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine of two tensors as vectors, in float64, or None if one is zero."""
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    # Rounding can exceed 1, which acos and sqrt(1 + cosine) of the callers do not accept
    return max(-1.0, min(1.0, float(x @ y) / norms)) if norms else None


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm over all elements, in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    return fmean(numbers) if (numbers := known(values)) else None


def over(statistic: Callable[[list[float]], float]) -> Callable[[Iterable[float | None]], str]:
    """Return a column format for lists: the statistic of the values that are not None."""
    return lambda values: number(statistic(numbers) if (numbers := known(values)) else None, ".4f")


def deltas(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare every tensor of at least 2 elements as one vector (PR 1501)."""
    tensors: dict[str, dict[str, float | None]] = {}
    for name in common((a, b)):
        x, y = a.state[name], b.state[name]
        if x.numel() >= 2:
            length, distance = norm(x), norm(y - x)
            tensors[name] = {"norm_a": length, "norm_b": norm(y), "distance": distance}
            tensors[name] |= {"relative_l2": ratio(distance, length), "cosine": cosine(x, y)}
    tensors = dict(sorted(tensors.items(), key=lambda item: -(item[1]["relative_l2"] or 0.0)))
    banks = mean(tensors[name]["cosine"] for name in BANK_NAMES)
    others = mean(tensor["cosine"] for name, tensor in tensors.items() if name not in BANK_NAMES)
    shown = columns(".5g", norm_a="|A|", norm_b="|B|", distance="|B-A|", relative_l2="|B-A|/|A|")
    shown += columns(".4f", cosine="cosine")
    return Summary.published(
        f"weight deltas, {a.name} to {b.name}",
        "Shows how far apart two tensors are as long vectors; cannot show that the networks differ, since "
        "reordering hidden channels or heads changes every number here but not the function.",
        tabulate(("tensor",), shown, tensors)[0],
        {"tensors": tensors, "mean_cosine_banks": banks, "mean_cosine_others": others},
    )


def slot_deltas(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare the matrix of each slot, alongside what independent weights would give.

    Two vectors of n elements with independent random directions have cosine 0 +- 1/sqrt(n), and
    |B - A| / |A| = sqrt(1 + |B|^2 / |A|^2). A slot that is zero in either model has None.
    """
    values = {name: _compare_slots(a.state[name], b.state[name]) for name in BANK_NAMES}
    shown = columns(len, cosine_by_slot="slots") + columns(over(fmean), cosine_by_slot="mean cosine")
    shown += columns(over(pstdev), cosine_by_slot="spread") + columns(over(min), cosine_by_slot="lowest")
    shown += columns(over(max), cosine_by_slot="highest")
    shown += columns("0 ± {:.1e}".format, cosine_spread_if_independent="if independent")
    shown += columns(
        over(fmean), relative_l2_by_slot="|B-A|/|A|", relative_l2_if_independent="if independent"
    )
    return Summary(
        f"weight deltas by slot, {a.name} to {b.name}",
        "Shows for each matrix whether two models share a direction more than independent weights would; "
        "cannot show whether they compute the same, as hidden channels and heads are not aligned first (that "
        "is not attempted).",
        *tabulate(("bank",), shown, values),
        draw("cosines", lambda axes: _paint_cosines(axes[0], values)),
    )


def _compare_slots(a: Tensor, b: Tensor) -> dict[str, Any]:
    x, y = a.double().flatten(1), b.double().flatten(1)
    norm_x, norm_y, distance = x.norm(dim=1), y.norm(dim=1), (y - x).norm(dim=1)
    # A zero slot has no direction; it keeps its place as None
    usable = ((norm_x > 0) & (norm_y > 0)).tolist()
    by_slot = {
        "cosine_by_slot": (x * y).sum(1) / (norm_x * norm_y),
        "relative_l2_by_slot": distance / norm_x,
        "relative_l2_if_independent": (1 + (norm_y / norm_x).square()).sqrt(),
    }
    compared: dict[str, Any] = {"elements": x.shape[1]}
    compared["cosine_spread_if_independent"] = 1 / math.sqrt(x.shape[1])
    for key, slots in by_slot.items():
        compared[key] = [v if ok else None for v, ok in zip(slots.tolist(), usable, strict=True)]
    return compared


def _paint_cosines(axes: Axes, values: dict[str, Any]) -> None:
    for name, bank in values.items():
        cosines = [math.nan if value is None else value for value in bank["cosine_by_slot"]]
        (line,) = axes.plot(cosines, "o-", markersize=3, label=name)
        for width in (-2, 2):
            level = width * bank["cosine_spread_if_independent"]
            axes.axhline(level, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="slot", ylabel="cosine", title="cosine by slot (dotted: independent weights, ± 2 sd)")
    axes.legend()


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix or a stack of matrices in descending order, float64."""
    return torch.linalg.svdvals(matrix.double())


def condition(values: Tensor) -> float | None:
    """Return the largest over the smallest singular value, or None if the smallest is zero."""
    return ratio(float(values[0]), float(values[-1]))


def stable_rank(values: Tensor) -> float | None:
    """Return the sum of squares over the largest square: the number of equally strong directions."""
    return ratio(float(values.square().sum()), float(values[0].square()))


def effective_rank(values: Tensor) -> float | None:
    """Return exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total else None


def spectra(models: Sequence[LoadedModel]) -> Summary:
    """Measure each large tensor, with banks flattened to one row per slot (PR 1501)."""
    keys = ("op_norm", "frobenius", "stable_rank", "condition")
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for model in models:
        tensors: dict[str, dict[str, Any]] = {}
        for name in large(model.state):
            sigma = singular_values(flattened(model.state[name]))
            tensors[name] = {"op_norm": float(sigma[0]), "frobenius": float(sigma.norm())}
            tensors[name] |= {"stable_rank": stable_rank(sigma), "condition": condition(sigma)}
            tensors[name] |= {"top": sigma[:ENDS].tolist(), "bottom": sigma[-ENDS:].tolist()}
        means = {key: mean(part[key] for part in tensors.values()) for key in keys}
        lipschitz = sum(math.log(part["op_norm"]) for part in tensors.values() if part["op_norm"])
        for name, part in {**tensors, f"mean of {len(tensors)}": means}.items():
            rows.append((model.name, name, *(number(part[key]) for key in keys)))
        rows.append((model.name, "sum of ln of largest", number(lipschitz), "-", "-", "-"))
        values[model.name] = {"tensors": tensors, "means": means, "log_lipschitz": lipschitz}
    return Summary.published(
        "spectra of flattened banks",
        "Shows the singular values of a bank flattened to a matrix with one row per slot; cannot show "
        "anything about its weight matrices, since a few long, nearly orthogonal rows of similar length have "
        "a condition number near 1 and full rank whatever they hold; embedding tables dominate the means.",
        Table(("model", "tensor", "largest", "Frobenius", "stable rank", "condition"), rows),
        values,
    )


def slot_spectra(models: Sequence[LoadedModel]) -> Summary:
    """Measure the matrix of each slot, averaged by bank."""
    slots = {m.name: {bank: singular_values(m.state[bank]) for bank in BANK_NAMES} for m in models}
    values = {m: {bank: _slot_values(sigma) for bank, sigma in banks.items()} for m, banks in slots.items()}
    shown = columns(len, largest="slots") + columns("d", full_rank="full rank")
    shown += columns(_mean_and_deviation, largest="largest", stable_rank="stable rank")
    shown += columns(_mean_and_deviation, effective_rank="effective rank", condition="condition")
    return Summary(
        "spectra of slots",
        "Shows for each weight matrix how its strength is spread over directions (mean ± standard deviation "
        "over the slots of a bank); cannot show which directions the data uses, nor how any of it affects "
        "the loss.",
        *tabulate(("model", "bank"), shown, values),
        draw("spectra", lambda axes: _paint_spectra(axes, slots), len(BANK_NAMES), width=11, height=3),
    )


def _slot_values(slots: Tensor) -> dict[str, Any]:
    values = {"full_rank": slots.shape[1], "largest": slots[:, 0].tolist()}
    ranks = {"stable_rank": stable_rank, "effective_rank": effective_rank, "condition": condition}
    values |= {name: [rank(sigma) for sigma in slots] for name, rank in ranks.items()}
    return {**values, "top": slots[:, :ENDS].tolist()}


def _mean_and_deviation(values: list[float | None]) -> str:
    numbers = known(values)
    if not numbers or not math.isfinite(fmean(numbers)):
        return "-"
    return f"{fmean(numbers):.4g} ± {pstdev(numbers):.2g}"


def _paint_spectra(axes: list[Axes], slots: dict[str, dict[str, Tensor]]) -> None:
    for panel, name in zip(axes, BANK_NAMES, strict=True):
        for model, banks in slots.items():
            curve = banks[name].mean(0).tolist()
            panel.plot(range(1, len(curve) + 1), curve, label=label(model))
        panel.set(title=name, xlabel="singular value", xscale="log")
    axes[0].set_ylabel("mean over slots")
    axes[0].legend()


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines of principal angles, (..., d, k) orthonormal -> (..., k) (Bjorck and Golub 1973)."""
    return torch.linalg.svdvals(a.mT @ b).clamp_max(1.0)


def random_overlap(directions: int, dimension: int) -> tuple[float, float]:
    """Return mean and deviation of the mean squared cosine of random k-dimensional subspaces in d dimensions.

    The mean is k / d; the sum of squares has variance 2 k^2 (d-k)^2 / (d^2 (d-1) (d+2)).
    """
    k, d = directions, dimension
    return (1.0, 0.0) if d == 1 else (k / d, math.sqrt(2 / ((d - 1) * (d + 2))) * (d - k) / d)


def overlap(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare the leading left singular vectors of large tensors, with banks flattened to one row per slot.

    As many vectors as a quarter of the smaller side, at most 32: 5 for 22 slots and 2 for 11 (PR 1501).
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name in (n for n in large(a.state) if n in b.state):
        matrices = [flattened(model.state[name]) for model in (a, b)]
        k = leading(min(matrices[0].shape))
        left = [torch.linalg.svd(matrix, full_matrices=False).U[:, :k] for matrix in matrices]
        cosines = principal_cosines(*left)
        tensors[name] = {"directions": k, "dimension": len(left[0]), "mean_cosine": float(cosines.mean())}
        tensors[name]["aligned"] = float((cosines > ALIGNED).double().mean())
        tensors[name]["cosines"] = cosines.tolist()
    overall = {key: mean(v[key] for v in tensors.values()) for key in ("mean_cosine", "aligned")}
    last = ("mean", "-", "-", *(number(value, ".3f") for value in overall.values()))
    shown = columns("d", directions="directions", dimension="of")
    shown += columns(".3f", mean_cosine="mean cosine", aligned=f"above {ALIGNED}")
    sizes = dict.fromkeys(f"{tensors[n]['directions']} of {tensors[n]['dimension']}" for n in BANK_NAMES)
    return Summary.published(
        f"subspace overlap, {a.name} and {b.name}",
        f"Shows which mixtures of slots are strongest in a bank ({', '.join(sizes)}), or of tokens in a "
        "table; cannot show whether layers work in the same subspaces, as directions of the residual stream "
        "are not compared, and random mixtures of so few slots overlap as much.",
        tabulate(("tensor",), shown, tensors, [last])[0],
        {"tensors": tensors, "mean": overall},
    )


def slot_overlap(a: LoadedModel, b: LoadedModel) -> Summary:
    """Compare the leading left and right singular subspaces of each slot, alongside random ones."""
    values = {name: _compare_subspaces(a.state[name], b.state[name]) for name in BANK_NAMES}
    shown = columns(len, mean_squared_cosine_by_slot="slots")
    shown += columns("d", directions="directions", dimension="of")
    shown += columns(over(fmean), mean_squared_cosine_by_slot="mean cosine²")
    shown += columns(over(pstdev), mean_squared_cosine_by_slot="spread")
    shown += columns(".4f", if_random="if random") + columns(".1e", spread_if_random="± if random")
    return Summary(
        f"subspace overlap by slot, {a.name} and {b.name}",
        "Shows whether the strongest outputs and inputs of the same matrix share a subspace more than random "
        "ones would; cannot show why (a common initialization or data set is enough), and compares hidden "
        "channels and heads (outputs of the MLP's first matrix and of Q, K, V, inputs of its second and of "
        "attention's projection) only in the order they happen to have.",
        *tabulate(("bank", "side"), shown, values),
        draw("overlap", lambda axes: _paint_overlap(axes, values), 2, width=9),
    )


def _compare_subspaces(a: Tensor, b: Tensor) -> dict[str, Any]:
    k = leading(min(a.shape[1:]))
    parts = [torch.linalg.svd(stack.double(), full_matrices=False) for stack in (a, b)]
    sides = {"outputs": [p.U[:, :, :k] for p in parts], "inputs": [p.Vh.mT[:, :, :k] for p in parts]}
    values: dict[str, Any] = {}
    for side, (x, y) in sides.items():
        by_chance, deviation = random_overlap(k, x.shape[1])
        cosines = {"mean_squared_cosine_by_slot": principal_cosines(x, y).square().mean(1).tolist()}
        chance = {"if_random": by_chance, "spread_if_random": deviation}
        values[side] = {"directions": k, "dimension": x.shape[1], **cosines, **chance}
    return values


def _paint_overlap(axes: list[Axes], values: dict[str, Any]) -> None:
    for panel, side in zip(axes, ("outputs", "inputs"), strict=True):
        for name, sides in values.items():
            part = sides[side]
            (line,) = panel.plot(part["mean_squared_cosine_by_slot"], "o-", markersize=3, label=name)
            panel.axhline(part["if_random"], color=line.get_color(), linestyle=":", linewidth=1)
        panel.set(xlabel="slot", ylabel="mean squared cosine", title=f"{side} (dotted: random)")
    axes[0].legend()


def triangle(three: Sequence[LoadedModel]) -> Summary:
    """Sum the distances of the tensors, and the norms of their centroid (PR 1502).

    A triangle is near-equilateral if its two shorter sides exceed 0.85 of the longest. Like that of
    a midpoint, the norm of the centroid is relative to the first model.
    """
    names = common(three)
    sides: dict[str, dict[str, float]] = {}
    for a, b in combinations(three, 2):
        distances = {name: norm(a.state[name] - b.state[name]) for name in names}
        banks, total = sum(distances[name] for name in BANK_NAMES), sum(distances.values())
        sides[f"{a.name} - {b.name}"] = {"banks": banks, "others": total - banks, "total": total}
    *shorter, longest = sorted(side["total"] for side in sides.values())
    equilateral = min(shorter) > EQUILATERAL * longest
    centroid = sum(norm(torch.stack([model.state[n] for model in three]).double().mean(0)) for n in names)
    share = ratio(centroid, sum(norm(three[0].state[name]) for name in names))
    last = [("near-equilateral", "-", "-", "yes" if equilateral else "no")]
    last.append(("|centroid| / |first|", "-", "-", number(share, ".4f")))
    return Summary.published(
        f"triangle of {', '.join(model.name for model in three)}",
        "Shows the distance between each pair of models; cannot show that they are different solutions, "
        "since any three weights of one length and one common cosine form an equilateral triangle.",
        tabulate(("side",), columns(".5g", banks="banks", others="others", total="total"), sides, last)[0],
        {"sides": sides, "near_equilateral": equilateral, "centroid_ratio": share},
    )


def angles(three: Sequence[LoadedModel]) -> Summary:
    """Measure the angle at each model between the other two, for the banks and for everything else.

    Independent weights of the same norms a, b, c are orthogonal: the cosine of their angle at a is
    a^2 / sqrt((a^2 + b^2) (a^2 + c^2)), which is 1/2 if all norms are equal.
    """
    others = [name for name in common(three) if name not in BANK_NAMES]
    measured: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, Any]] = {}
    for part, members in {"banks": BANK_NAMES, "others": others}.items():
        products = gram([model.state for model in three], members)
        independent, lengths = torch.diag(products.diagonal()), products.diagonal().sqrt()
        measured[part] = {}
        for at, model in zip(((0, 1, 2), (1, 0, 2), (2, 0, 1)), three, strict=True):
            both = {"degrees": angle_at(products, *at), "if_independent": angle_at(independent, *at)}
            measured[part][model.name] = both
        sides = combinations(range(3), 2)
        cosines = [ratio(float(products[i, j]), float(lengths[i] * lengths[j])) for i, j in sides]
        values[part] = {**measured[part], "cosines": cosines}
    shown = columns(".2f", degrees="degrees", if_independent="if independent")
    return Summary(
        f"angles of {', '.join(model.name for model in three)}",
        "Shows whether two models are in a common direction as seen from the third, more (a smaller angle) "
        "than independent weights of these norms would be; cannot show whether they compute the same, as "
        "hidden channels and heads are not aligned first.",
        tabulate(("part", "at"), shown, measured)[0],
        values,
    )


def gram(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Tensor:
    """Return the inner products of models over the named tensors, float64 (models, models)."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in names:
        rows = torch.stack([state[name].double().flatten() for state in states])
        total += rows @ rows.T
    return total


def angle_at(products: Tensor, i: int, j: int, k: int) -> float | None:
    """Return the degrees between (j - i) and (k - i) from inner products; None if either is only rounding."""
    p = products
    dot = float(p[j, k] - p[i, j] - p[i, k] + p[i, i])
    first, second = (float(p[i, i] + p[n, n] - 2 * p[i, n]) for n in (j, k))
    if any(side <= SAME * float(p[i, i] + p[n, n]) for side, n in ((first, j), (second, k))):
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(first * second)))))
