"""Plots of a report, and the table of paces."""

import math

from pgolf_fast.lab.report.plots import pace_table, paint_training, step_seconds


def test_pace_by_kind_of_step():
    elapsed = [1.0, 3.0, 5.0, 9.0, math.nan, 12.0, 11.0, 13.0]
    steps = {
        i: {"elapsed": e, "tokens": 100, "meta_loss": 1.0 if i == 4 else None}
        for i, e in enumerate(elapsed, start=1)
    }
    assert step_seconds(steps) == {2: 2.0, 3: 2.0, 4: 4.0, 8: 2.0}
    steps[8] |= {"reptile": True, "tokens": 10}
    rows = {row[0]: row[1:] for row in pace_table(steps).rows}
    assert rows["plain"] == ("2", "2,000.0", "2,000.0", "2,000.0", "50")
    assert rows["with a meta step"] == ("1", "4,000.0", "4,000.0", "4,000.0", "25")
    assert rows["Reptile, outer"] == ("1", "2,000.0", "2,000.0", "2,000.0", "5")
    assert (rows["all"][0], rows["all"][-1]) == ("4", "31")  # 310 tokens in 10 s
    assert pace_table({1: {"elapsed": 1.0}}).rows == ()


def test_a_spike_does_not_flatten_the_loss_curve():
    from matplotlib.figure import Figure

    steps = {s: {"loss": 7 - 0.02 * s, "multiplier": 1.0} for s in range(1, 201)}
    figure, spiked = Figure(), Figure()
    paint_training(figure, steps, [])
    paint_training(spiked, {**steps, 150: {**steps[150], "loss": 1e4}, 151: {"loss": math.inf}}, [])
    for one in (figure, spiked):
        low, high = one.axes[0].get_ylim()
        assert 2.5 < low < 3.0
        assert 7.0 < high < 7.5
