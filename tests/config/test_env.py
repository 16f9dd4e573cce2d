"""Environment variables as fields: values, switches, what follows, and what does not fit."""

from dataclasses import replace

import pytest

from pgolf_fast.config.env import FIELDS, translate
from pgolf_fast.config.fields import field_type
from pgolf_fast.config.presets import baseline, exp101, exp101_as_run, exp105a, exp106, pr301
from pgolf_fast.config.schema import MetaConfig, RunConfig


def of(text, base=None):
    """The translation of NAME=value words."""
    return translate(dict(word.split("=", 1) for word in text.split()), base or exp101())


def test_every_variable_stands_for_a_field():
    for field in FIELDS.values():
        field_type(RunConfig, field)


def test_variables_become_a_configuration():
    base = exp101_as_run()
    found = of(
        "SEED=42 ITERATIONS=7500 TRIGRAM=0 VE_LAYERS=7,8,9,10 META_TTT_ENABLED=0 QUUX=hello MATRIX_LR=0.03 "
        "TTT_LR=0.002 TTT_OPTIMIZER=adamw GPTQ_PERCDAMP=0.02",
        base,
    )
    want = replace(
        base,
        train=replace(base.train, meta=None),
        optim=replace(base.optim, matrix_lr=0.03),
        ttt=replace(base.ttt, lr=0.002, adapter="adamw"),
        quant=replace(base.quant, damping=0.02),
    )
    assert found.config == want
    assert found.used["VE_LAYERS"] == "model.ve_layers"
    assert (found.refused, found.adjusted) == ({}, [])


def test_quantization_of_the_record():
    """The variables of PR 1855's script, on a base with another grid and text of its own."""
    found = of(
        "MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=12 EMBED_CLIP_SIGMAS=15 EMBED_BITS=7 MATRIX_BITS=5 "
        "LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=2 LQER_ASYM_GROUP=32 GPTQ_CALIBRATION_BATCHES=16 "
        "AWQ_LITE_ENABLED=1"
    )
    quant, sigmas = found.config.quant, {"attention_sigmas": 12.0, "table_sigmas": 15.0}
    made = {"grid": "sdclip", "calibration": "shards", "calibration_sequences": 768, "protect_group": True}
    lqer = {"rank": 4, "lqer_tensors": 2, "lqer_group": 32}
    assert quant == replace(exp101().quant, bits=5, **sigmas, **made, **lqer)
    assert not found.refused
    assert [line.split(" is ")[0] for line in found.adjusted] == ["quant.calibration", "quant.grid"]
    assert of("LQER_ENABLED=0").config.quant.lqer_tensors == 0


def test_meta_learning():
    """The variables of PR 1502's script, and of PR 1601's, which keeps the split and the delta loss."""
    shared = "META_TTT_ENABLED=1 META_TTT_SPLIT=batch META_TTT_DELTA_WEIGHT=0.3 "
    meta = of(shared + "META_SGD_ENABLED=1").config.train.meta
    assert meta == MetaConfig(method="cross_chunk", delta_weight=0.3, slot_rates=True)
    meta = of(shared + "META_TTT_SAM_ENABLED=1 META_TTT_SAM_RHO=0.1").config.train.meta
    assert meta == MetaConfig(method="sam", delta_weight=0.3, sam_radius=0.1)
    # turning on what is on must not reset it
    assert of("META_TTT_ENABLED=1", exp106()).config == exp106()
    assert of("META_TTT_ENABLED=1 META_TTT_EVERY=2", exp105a()).config.train.meta == MetaConfig(every=2)
    off = of("META_TTT_EVERY=2", exp105a())
    assert off.config == exp105a()
    assert "train.meta is off" in off.refused["META_TTT_EVERY"]


def test_values_that_only_fit_together_are_set_together():
    config = of(
        "NUM_HEADS=6 MODEL_DIM=384 NUM_KV_HEADS=3 TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=524288"
    ).config
    assert (config.model.num_heads, config.model.model_dim, config.model.num_kv_heads) == (6, 384, 3)
    assert (config.train.batch_tokens, config.train.micro_batch_tokens) == (524_288, 65_536)
    assert of("GRAD_ACCUM_TOTAL=4").config.train.micro_batch_tokens == 196_608
    # an eighth of this batch is half a sequence
    small = of("TRAIN_BATCH_TOKENS=8192 TRAIN_SEQ_LEN=2048")
    assert small.config.train.micro_batch_tokens == 2048
    assert "whole sequences" in small.adjusted[0]


ZEROS = {  # variables at 0 -> fields, as the programs read them
    "MAX_WALLCLOCK_SECONDS=0": {
        "train.max_seconds": None,
        "train.schedule": "steps",
    },  # not "needs max_seconds"
    "MAX_WALLCLOCK_SECONDS=0.0": {"train.max_seconds": None, "train.schedule": "steps"},
    "MAX_WALLCLOCK_SECONDS=-1": {"train.max_seconds": None},  # the programs test for > 0
    "VAL_LOSS_EVERY=0": {"train.val_every": None},
    "TRAIN_LOG_EVERY=0 ITERATIONS=77": {"train.log_every": 77},  # no off: one line, at the end
    "EVAL_STRIDE=0": {"eval.stride": 2048},  # no sliding windows, not "must be positive"
    "EVAL_STRIDE=99999": {"eval.stride": 2048},
    "EVAL_STRIDE=0 EVAL_SEQ_LEN=1024": {"eval.stride": 1024},
    "EVAL_SEQ_LEN=0": {"eval.seq_len": None},
    "LATE_QAT_THRESHOLD=0": {"train.qat": None},
    "GRAD_CLIP_NORM=0": {"optim.grad_clip": None},
    "WARMDOWN_ITERS=0 WARMUP_STEPS=0": {"train.warmdown_steps": 0, "train.warmup_steps": 0},
    "SWA_ENABLED=0 SWA_EVERY=50": {"average.swa_every": None},  # not the 50 of the other variable
    "EMA_ENABLED=0 EMA_DECAY=0.99": {"average.ema_decay": 0.0, "average.ema_every": 1},
    "TTT_ENABLED=0 TTT_EPOCHS=3": {"ttt.epochs": 0},
    "BIGRAM_VOCAB_SIZE=0": {"model.bigram_vocab_size": 0, "model.trigram": False},
}


@pytest.mark.parametrize("text", ZEROS)
def test_zero_is_off(text):
    found = of(text)
    assert found.refused == {}
    for name, value in ZEROS[text].items():
        at = found.config
        for part in name.split("."):
            at = getattr(at, part)
        assert at == value, name


def test_switches_turn_on_what_the_base_has_off():
    found = of("SWA_ENABLED=1 EMA_ENABLED=1 TTT_ENABLED=1 LATE_QAT_THRESHOLD=0.2", baseline()).config
    assert (found.average.swa_every, found.average.ema_decay, found.ttt.epochs) == (50, 0.998, 4)
    assert found.train.qat.below == 0.2  # ignored, while the group is off
    assert of("SWA_ENABLED=1 SWA_EVERY=9", baseline()).config.average.swa_every == 9


def test_fields_that_follow_others_are_adjusted_aloud():
    found = of("NUM_LAYERS=3 MODEL_DIM=64")
    assert found.refused == {}
    assert found.config.model.ve_layers == ()
    assert (found.config.model.frozen_skips, found.config.model.rope_dims) == (1, 8)
    assert any("model.ve_layers" in line and "blocks 0 to 2" in line for line in found.adjusted)
    assert of("NUM_LAYERS=10").config.model.ve_layers == (7, 8, 9)  # not "[10] do not exist"
    assert of("WARMDOWN_FRAC=0.5").config.train.warmdown_steps is None
    assert of("LATE_QAT_THRESHOLD=0.2", pr301()).config.train.qat.from_share is None


UNFIT = {  # one variable that does not fit -> the reason
    "ITERATIONS=lots": "not a value of train.steps",
    "ITERATIONS=1e4": "not a value of train.steps",
    "ITERATIONS=0": "train.steps is 0; it must be positive",
    "SEED=": "not a value of train.seed",
    "MUON_MOMENTUM=nan": "not a value of optim.muon_momentum",  # float("nan") passes every comparison
    "SCALAR_LR=inf": "not a value of optim.scalar_lr",
    "DATA_PATH=": "not a value of data.path",  # "" would be the working directory
    "TRIGRAM=maybe": "not a value of model.trigram",
    "TIE_EMBEDDINGS=0": "not supported",
    "NUM_HEADS=7": "not a multiple of model.num_heads 7",
    "NUM_LAYERS=0": "num_layers is 0; it must be positive",
    "TRAIN_SEQ_LEN=1000": "not a multiple of train.seq_len 1000",
    "TTT_OPTIMIZER=lion": "ttt.adapter is 'lion'; it must be one of sgd, adamw",
    "EMA_DECAY=1": "average.ema_decay is 1.0",
}


@pytest.mark.parametrize("text", UNFIT)
def test_one_that_does_not_fit_leaves_the_rest(text):
    """Raising at the first, or dropping all that came after it, would lose MATRIX_LR."""
    name = text.partition("=")[0]
    found = of(f"{text} MATRIX_LR=0.07 QK_GAIN_INIT=4")
    assert found.used == {"MATRIX_LR": "optim.matrix_lr", "QK_GAIN_INIT": "model.qk_gain_init"}
    assert [*found.refused] == [name]
    assert UNFIT[text] in found.refused[name]
    assert found.config == of("MATRIX_LR=0.07 QK_GAIN_INIT=4").config


def test_several_that_do_not_fit_are_each_named():
    found = of("TIE_EMBEDDINGS=0 NUM_HEADS=7 ITERATIONS=x EMA_DECAY=2 NUM_LAYERS=9 VOCAB_SIZE=8192")
    assert {*found.refused} == {"TIE_EMBEDDINGS", "NUM_HEADS", "ITERATIONS", "EMA_DECAY"}
    assert (found.config.model.num_layers, found.config.model.vocab_size) == (9, 8192)


@pytest.mark.parametrize("text", ["MUON_WD=0.1 ADAM_WD=0.2", "ADAM_WD=0.2 MUON_WD=0.1"])
def test_two_variables_of_one_field_that_differ(text):
    found = of(text)
    assert found.config.optim.weight_decay == 0.1  # in any order: that of the matrices
    assert "one setting here, which MUON_WD=0.1 sets" in found.refused["ADAM_WD"]
    assert of("MUON_WD=0.1 ADAM_WD=0.10").refused == {}
