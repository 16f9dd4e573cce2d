"""Training that begins without the loop, and training on packed rows."""

import pytest
from runs import assert_same, differs, make_dataset, make_trainer, run_config, run_steps, weights_after

from pgolf_fast.config.schema import ReptileConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


LOOPS = {"model__num_loops": 1, "model__loop_start": 1, "model__loop_end": 1, "train__loop_from": 0.4}


def test_the_loop_begins_at_its_share_of_the_run(data):
    """Steps 0 to 3 of eight run without it; its extra skip row gets no gradient until then."""
    trainer = make_trainer(run_config(data, **LOOPS, train__meta=None))
    flags, rows = [], []
    for _ in range(8):
        trainer.advance()
        flags.append(trainer.model.looping)
        rows.append(bool(trainer.optimizer.adamw.state[trainer.model.skip_weights]["exp_avg"][1].any()))
    trainer.loader.close()
    assert flags == rows == [False] * 4 + [True] * 4


def test_resuming_on_either_side_of_the_loop(data):
    config = run_config(data, **LOOPS)
    straight = weights_after(config)
    for steps in (2, 6):
        half = weights_after(config, steps)
        again = make_trainer(config)
        again.restore({k: v.clone() for k, v in half.tensors().items()}, half.metadata())
        run_steps(again, 8 - steps)
        assert_same(straight.tensors(), again.tensors())


def test_a_run_that_ends_before_its_loop_is_scored_with_it(data, tmp_path):
    config = run_config(data, **LOOPS, train__schedule="time", train__max_seconds=1000.0)
    result = train(config, tmp_path / "run")
    assert any("before its loop (train.loop_from) began" in text for text in result.unfinished)


PACKED = {"train__max_document": 12, "train__meta": None}


@pytest.mark.parametrize("name", ["meta", "reptile"])
def test_packed_rows_refuse_what_splits_rows(data, name):
    others = {} if name == "meta" else {"train__meta": None, "train__reptile": ReptileConfig(share=0.5)}
    with pytest.raises(PgolfError, match=f"train.{name} needs rows of seq_len"):
        run_config(data, train__max_document=12, **others)


def test_training_on_packed_rows(data):
    """The same tokens as in rows, another loss; any number of shares; a resumed run goes on alike."""
    config = run_config(data, **PACKED)
    straight = weights_after(config)
    whole = weights_after(run_config(data, **PACKED, train__cpu_shares=1))
    assert_same(straight.tensors(), whole.tensors())
    half, again = weights_after(config, 4), make_trainer(config)
    again.restore({k: v.clone() for k, v in half.tensors().items()}, half.metadata())
    run_steps(again, 4)
    assert_same(straight.tensors(), again.tensors())
    assert differs(straight.tensors(), weights_after(run_config(data, train__meta=None)).tensors())
