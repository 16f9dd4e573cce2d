"""Presets, strict conversion and dotted fields."""

import json
from dataclasses import replace

import pytest

from pgolf_fast.config.checks import unknown
from pgolf_fast.config.fields import flatten, run_config_from_dict, run_config_to_dict, with_fields
from pgolf_fast.config.presets import (
    PRESETS,
    exp101,
    exp101_as_run,
    exp101_swiglu,
    exp105a,
    preset,
    shrink,
    small,
    tiny,
)
from pgolf_fast.config.run_folder import SCORES, read_scores
from pgolf_fast.config.schema import (
    DataConfig,
    EvalConfig,
    MetaConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
    TTTConfig,
)
from pgolf_fast.config.ttt import adapters
from pgolf_fast.errors import PgolfError


@pytest.mark.parametrize("make", [exp101, exp101_as_run, exp105a, exp101_swiglu])
def test_full_presets_have_26960991_parameters(make):
    assert make().model.num_parameters() == 26_960_991


def test_sizes_of_the_small_presets():
    assert small().model.num_parameters() == pytest.approx(3e6, rel=0.1)
    assert tiny().model.num_parameters() == pytest.approx(1e6, rel=0.1)


def difference(a, b):
    left, right = dict(flatten(a)), dict(flatten(b))
    return {n for n in left.keys() | right.keys() if left.get(n, ...) != right.get(n, ...)} - {"name"}


def test_exp105a_is_exp101_without_meta_and_nothing_else():
    assert (
        replace(exp105a(), name="exp101", train=replace(exp105a().train, meta=exp101().train.meta))
        == exp101()
    )
    assert exp105a().train.meta is None


def test_exp101_as_run_differs_where_the_description_did():
    assert difference(exp101(), exp101_as_run()) == {
        "model.trigram",
        "model.rope_bf16_tables",
        "train.qat.banks",
        "average.swa_apply",
        "eval.repeat_tail",
        "ttt.parameters",
        "ttt.quantize_forward",
    }


def test_swiglu_shapes():
    model = exp101_swiglu().model
    assert (model.mlp_up_rows, model.mlp_hidden) == (2048, 1024)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", ["small", "tiny"])
def test_shrink_takes_any_preset(name, size):
    config = shrink(preset(name), size)
    assert config.model.num_parameters() < 3.5e6
    assert config.model.mlp_activation == preset(name).model.mlp_activation
    assert (config.train.meta is None) == (preset(name).train.meta is None)
    assert config.ttt.parameters == preset(name).ttt.parameters


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(PgolfError, match=r"unknown preset 'exp1015'.*did you mean exp101\?"):
        preset("exp1015")
    with pytest.raises(PgolfError, match="unknown size 'big': sizes are small, tiny"):
        shrink(exp101(), "big")
    with pytest.raises(PgolfError, match=r"unknown field train.stepz: did you mean train.steps\?"):
        with_fields(exp101(), {"train.stepz": 3})
    with pytest.raises(PgolfError, match=r"unknown field trian: did you mean train\?"):
        with_fields(exp101(), {"trian.steps": 3})


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = preset(name)
    assert run_config_from_dict(json.loads(json.dumps(run_config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("train", "steps"), "many", r"train.steps is 'many'; it must be int"),
        (("train", "steps"), True, r"train.steps is True; it must be int"),
        (("train", "schedule"), "epochs", r"train.schedule is 'epochs'; it must be one of time, steps"),
        (("model", "trigrm"), 1, r"unknown field model.trigrm: did you mean model.trigram\?"),
        (("model",), 3, r"model is 3; it must be an object"),
    ],
)
def test_json_is_read_strictly(path, value, message):
    values = run_config_to_dict(exp101())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PgolfError, match=message):
        run_config_from_dict(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(num_heads=7), "model_dim 512 is not a multiple of model.num_heads 7"),
        (lambda: ModelConfig(num_kv_heads=3), "num_heads 8 is not a multiple of model.num_kv_heads 3"),
        (lambda: ModelConfig(rope_dims=15), "rope_dims 15 must be even"),
        (lambda: ModelConfig(rope_dims=66), "between 0 and the head dim 64"),
        (
            lambda: ModelConfig(ve_layers=(3, 11)),
            r"ve_layers \[11\] do not exist: the model has blocks 0 to 10",
        ),
        (lambda: ModelConfig(frozen_skips=6), "a model of 11 layers has 5 skips"),
        (lambda: ModelConfig(bigram_vocab_size=0), "model.trigram needs a hash table"),
        (lambda: ModelConfig(tie_embeddings=False), "tie_embeddings=False is not supported"),
        (lambda: ModelConfig(num_layers=0), "model.num_layers is 0; it must be positive"),
        (lambda: TrainConfig(micro_batch_tokens=1000), "is not a multiple of train.seq_len 2048"),
        (lambda: TrainConfig(batch_tokens=100_000), "batch_tokens 100000 is not a multiple"),
        (lambda: TrainConfig(max_seconds=None), "schedule 'time' needs train.max_seconds"),
        (lambda: ModelConfig(ve_layers=(3, 3)), "repeats a block"),
        (lambda: ModelConfig(xsa_last_n=-1), "model.xsa_last_n is -1; it must not be negative"),
        (lambda: ModelConfig(ve_dim=0), "model.ve_dim is 0; it must be positive"),
        (lambda: DataConfig(seed=-1), "data.seed is -1"),
        (lambda: MetaConfig(every=0), "train.meta.every is 0; it must be positive"),
        (lambda: TrainConfig(adaptive_every=0), "train.adaptive_every is 0"),
        (lambda: TrainConfig(warmdown_fraction=0.5), "give one and set the other to None"),
        (lambda: TrainConfig(warmdown_steps=None), "give one and set the other to None"),
        (lambda: TrainConfig(warmdown_steps=None, warmdown_fraction=1.5), "above 0 and at most 1"),
        (lambda: OptimConfig(adam_beta1=1.5), r"optim.adam_beta1 is 1.5; it must be at least 0 and below 1"),
        (lambda: QuantConfig(block_size=0), "quant.block_size is 0"),
        (lambda: QuantConfig(bits=9), "quant.bits is 9; it must be 2 to 8"),
        (lambda: TTTConfig(momentum=-1), "ttt.momentum is -1"),
        (lambda: TTTConfig(grad_clip=0), "ttt.grad_clip is 0; it must be positive"),
        (lambda: EvalConfig(seq_len=0), "eval.seq_len is 0; it must be positive"),
        (lambda: EvalConfig(stride=0), "eval.stride is 0; it must be positive"),
        (lambda: RunConfig(eval=EvalConfig(stride=4096)), "stride 4096 is longer than the window of 2048"),
    ],
)
def test_impossible_configurations_say_why(make, message):
    with pytest.raises(PgolfError, match=message):
        make()


@pytest.mark.parametrize("value", ["nan", "inf", float("-inf")])
@pytest.mark.parametrize("name", ["optim.adam_eps", "model.mlp_mult", "model.rope_base", "train.qat.below"])
def test_numbers_are_finite(name, value):
    with pytest.raises(PgolfError, match=f"{name} is -?(nan|inf); it must be finite"):
        with_fields(exp101(), {name: value})


def test_a_preset_name_may_carry_a_size():
    assert preset("exp105a_tiny") == shrink(exp105a(), "tiny")
    assert preset("exp105a_tiny").name == "exp105a_tiny"


def test_setting_a_field_of_a_group_that_is_off_switches_it_on():
    assert with_fields(exp105a(), {"train.meta.every": 2}).train.meta.every == 2
    assert with_fields(exp101(), {"train.qat": None}).train.qat is None


def test_fields_are_set_together_from_text_and_values():
    """Groups are set before their fields, and only the result needs to be valid."""
    meta = MetaConfig(inner_lr=0.1)
    values = {"train.meta.every": 8, "train.meta": meta, "model.ve_layers": "2,3", "train.max_seconds": 60}
    config = with_fields(exp101(), values)
    assert config.train.meta == replace(meta, every=8)
    assert config.model.ve_layers == (2, 3)
    assert config.train.max_seconds == 60.0
    both = with_fields(exp101(), {"model.bigram_vocab_size": "0", "model.trigram": "false"})
    assert not both.model.trigram
    with pytest.raises(PgolfError, match=r"model\.trigram is 'maybe'; it must be bool"):
        with_fields(exp101(), {"model.trigram": "maybe"})


def test_unknown_adapters_are_answered_with_the_nearest():
    names = adapters(256)
    assert all(name in names for name in ("sgd", "lora", "phased", "adamw-quantized"))
    assert "did you mean adamw-quantized?" in unknown("adapter", "adamw-quantised", names)


@pytest.mark.parametrize("value", [-1.0, 0, float("nan"), float("inf")])
def test_scores_are_positive_and_finite(tmp_path, value):
    path, scores = (
        tmp_path / "s.json",
        {name: dict.fromkeys(("bpb", "loss", "tokens", "bytes"), 1.5) for name in SCORES},
    )
    path.write_text(json.dumps(scores))
    assert read_scores(path) == scores
    path.write_text(json.dumps({**scores, "sliding": scores["sliding"] | {"bpb": value}}))
    with pytest.raises(PgolfError, match="does not hold three finite scores"):
        read_scores(path)
