"""`round_columns` against its formula in plain numbers, and torch against C++."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import native
from pgolf_fast.quant import gptq
from pgolf_fast.quant.gptq import round_columns

needs_extension = pytest.mark.skipif(native.extension() is None, reason="C++ extension not built")


def problem(columns: int, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return arguments of `round_columns` that are constant nowhere."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    upper = torch.triu(0.3 * torch.randn(columns, columns, generator=generator) * columns**-0.5, 1)
    return {
        "columns": torch.randn(columns, rows, generator=generator),
        "row_step": uniform(0.05, 0.2, rows),
        "factor": upper + torch.diag(uniform(0.5, 2.0, columns)),
        "column_step": uniform(0.5, 2.0, columns),
        "cost": uniform(0.0, 9.0, 7, 256),
        "row_class": torch.randint(4, (rows,), generator=generator, dtype=torch.int32),
        "column_class": torch.randint(4, (columns,), generator=generator, dtype=torch.int32),
        "lam": uniform(0.0, 0.02, rows),
    }


def plain(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: given[name] for name in ("columns", "row_step", "factor")}


def in_torch(**arguments) -> torch.Tensor:
    """Round as on a machine without the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "extension", lambda: None)
        return round_columns(**arguments)


def in_numbers(given: dict[str, torch.Tensor], clip_range: int, *, rate: bool) -> np.ndarray:
    """Evaluate the docstring of `round_columns` in float64, element by element."""
    w = given["columns"].double().numpy().copy()
    factor = given["factor"].double().numpy()
    codes = np.zeros(w.shape, dtype=np.int8)
    for i in range(w.shape[0]):
        for n in range(w.shape[1]):
            step = float(given["row_step"][n]) * float(given["column_step"][i])
            q = int(np.clip(np.round(w[i, n] / step), -clip_range, clip_range))
            if rate:
                bits = given["cost"][given["row_class"][n] + given["column_class"][i]]
                price = {
                    c: (w[i, n] - c * step) ** 2 / factor[i, i] ** 2 + float(given["lam"][n] * bits[c + 128])
                    for c in (q, q - int(np.sign(q)), 0)
                }
                q = min(price, key=price.__getitem__)
            codes[i, n] = q
            w[i + 1 :, n] -= (w[i, n] - q * step) / factor[i, i] * factor[i, i + 1 :]
    return codes


@pytest.mark.parametrize("run", [in_torch, pytest.param(round_columns, marks=needs_extension)])
@pytest.mark.parametrize("rate", [False, True])
def test_computes_the_formula(run, rate):
    given = problem(30, 21)
    if not rate:
        del given["cost"]
    codes = run(**given, clip_range=15, block_size=8).numpy()
    want = in_numbers(problem(30, 21), 15, rate=rate)
    assert codes.dtype == np.int8
    assert (codes == want).mean() >= 0.995  # a tie that falls the other way changes its row's later columns
    assert abs(codes).max() == 15
    if rate:
        nearest = in_numbers(problem(30, 21), 15, rate=False)
        assert 0.2 < (want != nearest).mean() < 0.9


@needs_extension
@settings(deadline=None, max_examples=60)
@given(
    columns=st.integers(1, 70),
    rows=st.integers(1, 600),
    clip_range=st.sampled_from([1, 7, 31, 127]),
    block_size=st.sampled_from([1, 5, 32, 128]),
    rate=st.booleans(),
    seed=st.integers(0, 5),
)
def test_cpp_matches_torch(columns, rows, clip_range, block_size, rate, seed):
    given = problem(columns, rows, seed)
    if not rate:
        given = plain(given)
    native = round_columns(**given, clip_range=clip_range, block_size=block_size, threads=2)
    want = in_torch(**given, clip_range=clip_range)
    assert (native != want).float().mean() <= 2e-3
    assert (native.int() - want.int()).abs().max() <= (2 * clip_range if rate else 2)


@pytest.mark.parametrize("run", [in_torch, round_columns])
def test_batch_equals_single_problems(run):
    several = [problem(24, 40, seed) for seed in range(3)]
    for name in ("columns", "cost"):
        assert not torch.equal(several[0][name], several[1][name])
    cost = several[0]["cost"]
    stacked = {name: torch.stack([p[name] for p in several]) for name in several[0]} | {"cost": cost}
    together = run(**stacked, clip_range=31)
    for codes, one in zip(together, several, strict=True):
        assert (codes == run(**one | {"cost": cost}, clip_range=31)).float().mean() >= 0.999


@pytest.mark.parametrize("run", [in_torch, round_columns])
def test_omitted_arguments_are_ones_or_zeros(run):
    given = problem(20, 33)
    bare = plain(given) | {"cost": given["cost"], "lam": 1e-3}
    full = given | {
        "column_step": torch.ones(20),
        "row_class": torch.zeros(33, dtype=torch.int32),
        "column_class": torch.zeros(20, dtype=torch.int32),
        "lam": torch.full((33,), 1e-3),
    }
    before = {name: tensor.clone() for name, tensor in full.items()}
    assert torch.equal(run(**bare, clip_range=31), run(**full, clip_range=31))
    assert all(torch.equal(full[name], tensor) for name, tensor in before.items())
    free = run(**plain(given), clip_range=31)
    assert torch.equal(run(**bare | {"lam": 0.0}, clip_range=31), free)
    assert (
        run(**bare | {"lam": 1e6, "cost": (torch.arange(256.0) - 128).abs()[None]}, clip_range=31).eq(0).all()
    )
    none = {"columns": torch.zeros(20, 0), "row_step": torch.zeros(0), "factor": given["factor"]}
    assert run(**none, clip_range=31).shape == (20, 0)


def test_rejects_arguments_that_do_not_fit():
    given = problem(6, 5)
    for name, message in (
        ("row_step", r"row_step must be \(1, 5\)"),
        ("factor", r"factor must be \(1, 6, 6\)"),
        ("column_class", r"column_class must be \(1, 6\)"),
    ):
        with pytest.raises(PgolfError, match=message):
            round_columns(**given | {name: given[name][1:]}, clip_range=31)
    with pytest.raises(PgolfError, match="clip_range is 128"):
        round_columns(**given, clip_range=128)
    with pytest.raises(PgolfError, match=r"must be \(classes, 256\)"):
        round_columns(**given | {"cost": torch.zeros(7, 255)}, clip_range=31)
    for classes in (torch.full((5,), 6), torch.full((5,), -1)):
        with pytest.raises(PgolfError, match="7 classes"):
            round_columns(**given | {"row_class": classes.int()}, clip_range=31)


@needs_extension
def test_cpp_checks_buffer_sizes():
    """Without Python's checks it must still stay inside its buffers."""
    block = native.extension().gptq_round_block
    good = [
        np.zeros((3, 4), "f4"),
        np.zeros((3, 4), "i1"),
        np.ones(4, "f4"),
        np.ones(3, "f4"),
        np.eye(3, dtype="f4"),
    ]
    rate = {
        "cost": np.zeros((2, 256), "f4"),
        "row_class": np.zeros(4, "i4"),
        "column_class": np.ones(3, "i4"),
        "lam": np.ones(4, "f4"),
    }
    block(*good, 31)
    block(*good, 31, **rate)
    for i in range(5):
        with pytest.raises(ValueError, match=r"must be|must have"):
            block(*[a[:2] if i == j else a for j, a in enumerate(good)], 31)
    wrong = {name: array[:1] for name, array in rate.items()} | {"cost": np.zeros((2, 255), "f4")}
    for name, array in wrong.items():
        with pytest.raises(ValueError, match=r"must be|must have"):
            block(*good, 31, **rate | {name: array})
    with pytest.raises(ValueError, match="needs row_class"):
        block(*good, 31, cost=rate["cost"])
    for classes in (np.full(4, 1, "i4"), np.full(4, -1, "i4"), np.full(4, 2**31 - 1, "i4")):
        with pytest.raises(ValueError, match="one of the 2 rows"):
            block(*good, 31, **rate | {"row_class": classes})
    with pytest.raises(ValueError, match="clip_range"):
        block(*good, 128)
    with pytest.raises(TypeError):
        block(good[0].astype("f8"), *good[1:], 31)
