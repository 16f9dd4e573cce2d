"""Analyses of weights: published forms against transcriptions, corrected forms against brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_config

from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis import geometry, quant, surface
from pgolf_fast.lab.analysis.geometry import leading
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.summary import Options
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT

OPTIONS = Options()


def loaded(name, seed=0, scale=0.2, **changes):
    """A model of random weights without zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: t.shape for n, t in GPT(tiny_config(**changes)).state_dict().items()}
    state = {n: scale * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return LoadedModel(name, Path(name), state, None, None)


def banks(name, slots, seed=0, rows=48, columns=40):
    """Only banks, with as many slots as in exp101: 22, 22, 11 and 11."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"qo_bank": slots, "kv_bank": slots, "mlp_up_bank": slots // 2, "mlp_down_bank": slots // 2}
    state = {n: 0.2 * torch.randn(s, rows, columns, generator=generator) for n, s in sizes.items()}
    return LoadedModel(name, Path(name), state, None, None)


@pytest.fixture(scope="module")
def two():
    return loaded("a", 1), loaded("b", 2)


def test_published_deltas_compare_whole_tensors(two):
    result = geometry.deltas(*two).values["tensors"]
    a, b = ({n: t.numpy().astype(np.float64) for n, t in s.state.items()} for s in two)
    assert set(result) == {n for n in a if a[n].size >= 2} != set(a)
    for name, part in result.items():
        x, y = a[name].ravel(), b[name].ravel()
        assert part["norm_a"] == pytest.approx(math.sqrt((x * x).sum()))
        assert part["norm_b"] == pytest.approx(math.sqrt((y * y).sum()))
        assert part["distance"] == pytest.approx(math.sqrt(((y - x) ** 2).sum()), rel=1e-6)
        assert part["relative_l2"] == pytest.approx(part["distance"] / part["norm_a"])
        assert part["cosine"] == pytest.approx((x * y).sum() / part["norm_a"] / part["norm_b"])
    relative = [part["relative_l2"] for part in result.values()]
    assert relative == sorted(relative, reverse=True)


def test_deltas_by_slot_match_independent_weights(two):
    for name, part in geometry.slot_deltas(*two).values.items():
        n = part["elements"]
        assert n == two[0].state[name][0].numel()
        assert part["cosine_spread_if_independent"] == pytest.approx(n**-0.5)
        for slot, (cosine, relative, independent) in enumerate(
            zip(
                part["cosine_by_slot"],
                part["relative_l2_by_slot"],
                part["relative_l2_if_independent"],
                strict=True,
            )
        ):
            x, y = (s.state[name][slot].double().flatten() for s in two)
            assert cosine == pytest.approx(float(x @ y / x.norm() / y.norm()))
            assert abs(cosine) < 5 * n**-0.5  # they are independent
            assert relative == pytest.approx(float((y - x).norm() / x.norm()))
            assert independent == pytest.approx(relative, abs=5 * n**-0.5)


def test_identical_and_orthogonal_models():
    a = loaded("a", 1)
    same = geometry.deltas(a, a).values
    assert [same["mean_cosine_banks"], same["mean_cosine_others"]] == pytest.approx([1, 1])
    assert all(part["relative_l2"] == 0 for part in same["tensors"].values())
    assert surface.mode_connectivity(a, a).values["ratio"] == pytest.approx(1)
    assert all(p["ratio"] == pytest.approx(1) for p in surface.midpoint_norms(a, a).values.values())
    x, y = ({n: torch.zeros_like(t) for n, t in a.state.items()} for _ in range(2))
    for name in BANK_NAMES:
        x[name][..., 0::2], y[name][..., 1::2] = 1.0, 1.0
    left, right = LoadedModel("x", Path("x"), x, None, None), LoadedModel("y", Path("y"), y, None, None)
    assert geometry.deltas(left, right).values["mean_cosine_banks"] == 0
    assert geometry.deltas(left, right).values["mean_cosine_others"] is None  # zeros have no angle
    for part in surface.midpoint_norms(left, right).values.values():
        assert [part["ratio"], part["from_cosine"]] == pytest.approx([math.sqrt(0.5)] * 2)
    assert surface.mode_connectivity(left, right).values["ratio"] == pytest.approx(math.sqrt(0.5))


def test_opposite_models_have_a_zero_midpoint():
    """Their cosine is -1 up to rounding."""
    for seed in range(4):
        a = loaded("a", seed)
        b = LoadedModel("b", Path("b"), {n: -t for n, t in a.state.items()}, None, None)
        for part in surface.midpoint_norms(a, b).values.values():
            assert part["cosine"] == pytest.approx(-1)
            assert [part["ratio"], part["from_cosine"]] == pytest.approx([0, 0], abs=1e-6)


def test_a_slot_of_zeros_keeps_its_place(two):
    state = {n: t.clone() for n, t in two[0].state.items()}
    state["qo_bank"][1] = 0
    result = geometry.slot_deltas(LoadedModel("a", Path("a"), state, None, None), two[1])
    whole = geometry.slot_deltas(*two).values["qo_bank"]
    for key in ("cosine_by_slot", "relative_l2_by_slot", "relative_l2_if_independent"):
        values = result.values["qo_bank"][key]
        assert values == [None if slot == 1 else v for slot, v in enumerate(whole[key])]
    assert result.plots["cosines"].startswith(b"\x89PNG")


def test_published_connectivity_is_sums_of_norms(two):
    result = surface.mode_connectivity(*two).values
    a, b = ({n: t.numpy().astype(np.float64) for n, t in s.state.items()} for s in two)

    def norms(tensors):
        return sum(float(np.sqrt((t * t).sum())) for t in tensors)

    assert result["norm_a"] == pytest.approx(norms(a.values()))
    assert result["norm_b"] == pytest.approx(norms(b.values()))
    assert result["distance"] == pytest.approx(norms(a[n] - b[n] for n in a), rel=1e-6)
    assert result["norm_middle"] == pytest.approx(norms((a[n] + b[n]) / 2 for n in a))
    assert result["ratio"] == pytest.approx(result["norm_middle"] / result["norm_a"])


@pytest.mark.parametrize("scale", [0.15, 0.2])
def test_published_rounding_error_does_not_depend_on_the_weights(scale):
    """8.67e-5 for any bank whose rows stay below 1 ((1/31)^2 / 12)."""
    generator = torch.Generator().manual_seed(3)
    bank = scale * torch.randn(4, 256, 256, generator=generator).clamp_(-4.5, 4.5)
    assert bank.abs().max() < 1
    one = LoadedModel("one", Path("one"), dict.fromkeys(BANK_NAMES, bank), None, None)
    result = quant.published([one]).values
    assert result["step_squared_over_12"] == pytest.approx(8.67e-5, rel=2e-4)
    # the squared error of a uniform number has a spread of 0.894 of its mean
    error = 4 * 0.894 / math.sqrt(bank.numel())
    assert result["models"]["one"]["mean_mse"] == pytest.approx(result["step_squared_over_12"], rel=error)


def test_published_rounding_is_the_formula(two):
    result = quant.published(two).values["models"]
    for s in two:
        for name in BANK_NAMES:
            bank = 6 * s.state[name].numpy()  # rows above 1 as well
            for slot, matrix in enumerate(bank):
                step = np.maximum(np.abs(matrix).max(1, keepdims=True) / 31, np.float32(1 / 31))
                rounded = np.clip(np.round(matrix / step), -31, 31) * step
                done = quant.floored_grid(torch.from_numpy(bank[slot]))
                np.testing.assert_allclose(done.numpy(), rounded, rtol=1e-6, atol=1e-7)
        own = [m for n in BANK_NAMES for m in s.state[n]]
        errors = [float((m - quant.floored_grid(m)).double().square().mean()) for m in own]
        listed = [e for n in BANK_NAMES for e in result[s.name]["slot_mse"][n]]
        assert listed == pytest.approx(errors, rel=1e-6)
        sizes = [m.numel() for m in own]
        weighted = sum(e * n for e, n in zip(errors, sizes, strict=True)) / sum(sizes)
        assert result[s.name]["mean_mse"] == pytest.approx(weighted)


def test_rounding_of_models_of_different_shapes_has_no_ratio(two):
    other = loaded("c", model_dim=64)
    result = quant.published([two[0], other])
    assert "No ratios: qo_bank is (8, 32, 32) in a and (8, 64, 64) in c: only models of one" in result.shows
    assert result.table.header == ("bank", "a", "c")
    assert "ratio" in quant.published(two).table.header
    assert "No ratios" not in quant.published(two).shows
    assert "No ratios" not in quant.published([*two, other]).shows


def test_rounding_by_row_is_finer_and_weighted_errors_are_those_of_outputs(two):
    for part in quant.corrected(two).values["a"].values():
        assert part["relative_row"] < part["relative_published"]
        assert part["rows_on_the_floor"] == 1
    x, w = torch.randn(50, 6).double(), torch.randn(4, 6).double()
    assert quant.energy_out(w, x.T @ x) == pytest.approx(float((x @ w.T).square().sum()))


def test_weighted_errors_use_the_inputs_of_each_matrix(two):
    """A Hessian that only one group of matrices reads affects only the bank of that group."""
    a, n = two[0], len(two[0].state["mlp_up_bank"])
    sides = {"attn_in": 32, "attn_out": 32, "mlp_in": 32, "mlp_hidden": a.state["mlp_down_bank"].shape[2]}
    hessians = {f"blocks.{i}.{which}": torch.eye(side) for i in range(n) for which, side in sides.items()}
    plain = quant.weighted([a], {"a": hessians}, "nothing").values["a"]
    for name, part in quant.corrected([a]).values["a"].items():
        # white inputs weight all elements equally
        assert plain[name]["published"] == pytest.approx(part["relative_published"])
        assert plain[name]["row"] == pytest.approx(part["relative_row"])
    hessians["blocks.1.mlp_hidden"] = torch.diag(torch.arange(1.0, 1 + sides["mlp_hidden"]))
    other = quant.weighted([a], {"a": hessians}, "nothing").values["a"]
    assert {name for name in plain if plain[name] != other[name]} == {"mlp_down_bank"}


def test_published_spectra_flatten_banks_to_slots(two):
    result = geometry.spectra(two).values["a"]
    assert {*BANK_NAMES} <= set(result["tensors"])
    for name in BANK_NAMES:
        bank = two[0].state[name].numpy().astype(np.float64)
        values = np.linalg.svd(bank.reshape(len(bank), -1), compute_uv=False)
        part = result["tensors"][name]
        assert part["op_norm"] == pytest.approx(values[0])
        assert part["frobenius"] == pytest.approx(np.linalg.norm(bank))
        assert part["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2)
        assert part["condition"] == pytest.approx(values[0] / values[-1])
        np.testing.assert_allclose(part["top"], values[:5])
    norms = [part["op_norm"] for part in result["tensors"].values()]
    assert result["log_lipschitz"] == pytest.approx(np.log(norms).sum())
    assert result["means"]["op_norm"] == pytest.approx(np.mean(norms))


def test_published_spectra_take_tables_from_65536_elements_on():
    large = loaded("large", vocab_size=2048).state
    assert large["tok_emb.weight"].numel() == 65_536 > large["bigram.embed.weight"].numel()
    names = geometry.spectra([LoadedModel("l", Path("l"), large, None, None)]).values["l"]["tensors"]
    assert set(names) == {*BANK_NAMES, "tok_emb.weight"}


def test_spectra_of_slots_match_each_matrix(two):
    result = geometry.slot_spectra(two).values["b"]
    for name in BANK_NAMES:
        for slot, matrix in enumerate(two[1].state[name].double()):
            values = np.linalg.svd(matrix.numpy(), compute_uv=False)
            shares = values / values.sum()
            assert result[name]["largest"][slot] == pytest.approx(values[0])
            assert result[name]["stable_rank"][slot] == pytest.approx((values**2).sum() / values[0] ** 2)
            assert result[name]["effective_rank"][slot] == pytest.approx(
                np.exp(-(shares * np.log(shares)).sum())
            )
            assert result[name]["condition"][slot] == pytest.approx(values[0] / values[-1], rel=1e-6)


def test_effective_and_stable_rank_of_known_matrices():
    assert geometry.effective_rank(torch.ones(7).double()) == pytest.approx(7)
    assert geometry.stable_rank(torch.ones(7).double()) == 7
    one = torch.tensor([3.0, 0, 0]).double()
    assert geometry.effective_rank(one) == geometry.stable_rank(one) == 1
    assert geometry.condition(one) is None
    assert geometry.effective_rank(torch.zeros(3).double()) is None


def test_directions_of_the_published_overlap():
    """5 of 22 slots, 2 of 11 (the published table says 32)."""
    assert [leading(n) for n in (22, 11, 512, 128, 64, 3)] == [5, 2, 32, 32, 16, 1]
    result = geometry.overlap(banks("a", 22), banks("b", 22, 1)).values["tensors"]
    assert {n: (p["directions"], p["dimension"]) for n, p in result.items()} == {
        "qo_bank": (5, 22),
        "kv_bank": (5, 22),
        "mlp_up_bank": (2, 11),
        "mlp_down_bank": (2, 11),
    }


def test_published_overlap_is_between_left_singular_vectors_of_flattened_banks():
    a, b = banks("a", 22), banks("b", 22, 1)
    for name, part in geometry.overlap(a, b).values["tensors"].items():
        left = []
        for s in (a, b):
            flat = s.state[name].numpy().astype(np.float64).reshape(len(s.state[name]), -1)
            left.append(np.linalg.svd(flat, full_matrices=False)[0][:, : part["directions"]])
        cosines = np.linalg.svd(left[0].T @ left[1], compute_uv=False)
        assert part["mean_cosine"] == pytest.approx(cosines.mean())
        assert part["aligned"] == (cosines > 0.9).mean()
    assert "strongest in a bank (5 of 22, 2 of 11)" in geometry.overlap(a, b).shows
    assert "strongest in a bank (2 of 8, 1 of 4)" in geometry.overlap(loaded("a"), loaded("b")).shows
    same = geometry.overlap(a, a).values["mean"]
    assert same == {"mean_cosine": pytest.approx(1), "aligned": 1}


def test_names_in_plots_are_escaped():
    from matplotlib.figure import Figure

    from pgolf_fast.bench.drawing import label

    axes = Figure().subplots()
    names = ("a$_$b", "_c", "plain")
    for name in names:
        axes.plot([0, 1], [0, 1], label=label(name))
    shown = [text.get_text() for text in axes.legend().get_texts()]
    assert [text.strip().replace(r"\$", "$") for text in shown] == list(names)


def test_overlap_of_slots_matches_random_subspaces():
    a, b = banks("a", 22), banks("b", 22, 1)
    for name, sides in geometry.slot_overlap(a, b).values.items():
        for side, axis in (("outputs", 0), ("inputs", 1)):
            part = sides[side]
            k, d = part["directions"], part["dimension"]
            assert (k, d) == (10, (48, 40)[axis])
            for slot, result in enumerate(part["mean_squared_cosine_by_slot"]):
                projectors = []
                for s in (a, b):
                    u, _, vt = np.linalg.svd(s.state[name][slot].numpy().astype(np.float64))
                    basis = u[:, :k] if axis == 0 else vt[:k].T
                    projectors.append(basis @ basis.T)
                assert result == pytest.approx(np.trace(projectors[0] @ projectors[1]) / k)
            mean = np.mean(part["mean_squared_cosine_by_slot"])
            slots = len(part["mean_squared_cosine_by_slot"])
            assert abs(mean - part["if_random"]) < 4 * part["spread_if_random"] / math.sqrt(slots)
    for sides in geometry.slot_overlap(a, a).values.values():
        assert sides["inputs"]["mean_squared_cosine_by_slot"][0] == pytest.approx(1)


def test_random_overlap_matches_sampled_subspaces():
    generator = torch.Generator().manual_seed(0)
    for k, d in ((2, 11), (5, 22), (8, 9)):
        x, y = (
            torch.linalg.qr(torch.randn(4000, d, k, generator=generator, dtype=torch.float64)).Q
            for _ in range(2)
        )
        drawn = geometry.principal_cosines(x, y).square().mean(1)
        mean, deviation = geometry.random_overlap(k, d)
        assert float(drawn.mean()) == pytest.approx(mean, abs=5 * deviation / math.sqrt(4000))
        assert float(drawn.std()) == pytest.approx(deviation, rel=0.1)


def test_published_proxies_of_the_error_surface(two):
    for name, part in surface.proxies(two).values["a"].items():
        bank = two[0].state[name].numpy().astype(np.float64)
        values = np.linalg.svd(bank.reshape(len(bank), -1), compute_uv=False)
        shares = values / values.sum()
        assert part["condition"] == pytest.approx(values[0] / values[-1])
        assert part["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert part["trace_proxy"] == pytest.approx((bank**2).sum())
        assert part["gap"] == pytest.approx(values[0] - values[1])
        assert part["top_energy"] == pytest.approx((values[:5] ** 2).sum() / (values**2).sum())


def test_triangle_as_published_and_its_angles():
    three = [loaded(n, i) for i, n in enumerate("abc")]
    result = geometry.triangle(three).values
    a, b, c = ({n: t.numpy().astype(np.float64) for n, t in s.state.items()} for s in three)
    apart = {n: np.linalg.norm(a[n] - c[n]) for n in a}
    side = result["sides"]["a - c"]
    assert side["banks"] == pytest.approx(sum(apart[n] for n in BANK_NAMES), rel=1e-6)
    assert side["total"] == pytest.approx(sum(apart.values()), rel=1e-6)
    assert side["others"] == pytest.approx(side["total"] - side["banks"])
    centroid = sum(np.linalg.norm((a[n] + b[n] + c[n]) / 3) for n in a)
    assert result["centroid_ratio"] == pytest.approx(centroid / sum(np.linalg.norm(t) for t in a.values()))
    assert result["near_equilateral"]  # as any three independent models of one size are
    angles = geometry.angles(three).values["banks"]
    x, y, z = (np.concatenate([m[n].ravel() for n in BANK_NAMES]) for m in (a, b, c))
    cosine = (x - y) @ (z - y) / np.linalg.norm(x - y) / np.linalg.norm(z - y)
    assert angles["b"]["degrees"] == pytest.approx(np.degrees(np.arccos(cosine)))
    assert angles["b"]["if_independent"] == pytest.approx(60, abs=1)
    assert angles["b"]["degrees"] == pytest.approx(angles["b"]["if_independent"], abs=1)
    assert sum(angles[n]["degrees"] for n in "abc") == pytest.approx(180)


def test_triangle_that_is_not_equilateral():
    a, c = loaded("a", 0), loaded("c", 1)
    near = {n: t + 0.1 * torch.randn(t.shape) for n, t in a.state.items()}
    three = [a, LoadedModel("b", Path("b"), near, None, None), c]
    assert not geometry.triangle(three).values["near_equilateral"]
    angles = geometry.angles(three).values["banks"]
    assert angles["c"]["degrees"] < 30 < angles["c"]["if_independent"]


def test_identical_models_have_no_direction():
    near = 1 - 2e-16
    products = [[1.0, near, 0.3], [near, 1.0, 0.3], [0.3, 0.3, 1.0]]
    rounded = 1e4 * torch.tensor(products, dtype=torch.float64)
    assert geometry.angle_at(rounded, 0, 1, 2) is None
    assert geometry.angle_at(rounded, 2, 0, 1) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "summaries",
    [
        geometry.analyze_deltas,
        geometry.analyze_overlap,
        surface.analyze_connectivity,
        geometry.analyze_triangle,
    ],
)
def test_models_of_different_shapes_are_refused_by_name(summaries):
    three = [loaded("a"), loaded("b"), loaded("c", model_dim=64)]
    with pytest.raises(PgolfError, match=r"qo_bank is \(8, 32, 32\) in a and \(8, 64, 64\) in c"):
        summaries(three, OPTIONS)


def test_every_summary_says_what_it_shows(two):
    three = [*two, loaded("c", 3)]
    summaries = [
        summary
        for summaries in (
            geometry.analyze_deltas,
            geometry.analyze_overlap,
            geometry.analyze_spectra,
            quant.analyze,
            surface.analyze_connectivity,
            surface.analyze_surface,
            geometry.analyze_triangle,
        )
        for summary in summaries(three, OPTIONS)
    ]
    for summary in summaries:
        assert summary.shows.endswith(".")
        if summary.table.rows:
            assert summary.shows.startswith("Shows ")
            assert "cannot show" in summary.shows
        else:
            assert "--preset" in summary.shows  # a file that names neither network nor data
    assert {summary.form for summary in summaries} == {"published", "corrected"}
    assert all(png.startswith(b"\x89PNG") for summary in summaries for png in summary.plots.values())
