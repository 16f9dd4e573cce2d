"""Collisions in the hash table, and its contribution."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import real_data
from helpers import randomize_, tiny_config
from runs import make_dataset, run_config

from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.tokenizer import Tokenizer, byte_table
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import save_tensors
from pgolf_fast.lab.analysis.hash_table import (
    GATE,
    ORDERS,
    TABLE,
    TRIGRAM,
    _without,
    all_pairs,
    analyze,
    analyze_layouts,
    contexts_of,
    groups,
    ideal_load,
    load,
)
from pgolf_fast.lab.analysis.models import LoadedModel, open_model, open_validation
from pgolf_fast.lab.analysis.summary import Options
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import reference

LAYOUTS = [(split, trigram) for split in (False, True) for trigram in (False, True)]
VOCAB = 96


@pytest.fixture(scope="module")
def text():
    """Frequent and rare tokens, and which of them start a word."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.06, 3000), VOCAB) - 1
    return tokens, rng.random(VOCAB) < 0.3


def config_of(split, trigram, rows=64):
    return tiny_config(bigram_vocab_size=rows, pos_conditional=split, trigram=trigram)


def per_bucket(flags, split):
    config = ModelConfig(bigram_vocab_size=4096, pos_conditional=split, trigram=False)
    return {one.kind: one for one in all_pairs(config, flags)}


def test_published_contexts_per_bucket():
    """PR 1501: 256 shared, 163 and 350 split, of 325 word starts among 1,024 pieces."""
    flags = np.arange(1024) < 325
    shared, split = per_bucket(flags, False), per_bucket(flags, True)
    assert {kind: round(one.per_bucket) for kind, one in shared.items()} == {"all": 256}
    assert {kind: round(one.per_bucket) for kind, one in split.items()} == {"word start": 163, "other": 350}
    assert [one.contexts for one in split.values()] == [332_800, 715_776]


def test_published_contexts_come_from_the_sp1024_tokenizer():
    path = real_data() / "tokenizers" / "fineweb_1024_bpe.model"
    if not path.is_file():
        pytest.skip(f"no {path}")
    flags = byte_table(Tokenizer.load(path)).has_leading_space
    assert (len(flags), int(flags.sum())) == (1024, 325)
    assert round(per_bucket(flags, False)["all"].per_bucket) == 256
    assert [round(one.per_bucket) for one in per_bucket(flags, True).values()] == [163, 350]


@pytest.mark.parametrize("split", [False, True])
def test_published_counts_match_hashing_all_pairs(split, text):
    flags = text[1]
    ids = torch.arange(VOCAB)
    pairs = torch.cartesian_prod(ids, ids)  # every (previous, current)
    rows = reference.ngram_rows(pairs, 64, torch.from_numpy(flags) if split else None, False)[0][:, 1]
    for one in all_pairs(config_of(split, False), flags):
        kind = torch.from_numpy({"word start": flags, "other": ~flags}.get(one.kind, flags | True))
        mine = rows[kind[pairs[:, 1]]]
        assert (one.contexts, one.buckets) == (len(mine), len(mine.unique()))


@pytest.mark.parametrize(("split", "trigram"), LAYOUTS)
def test_contexts_and_load_match_a_slow_count(split, trigram, text):
    tokens, flags = text
    config = config_of(split, trigram)
    leading = torch.from_numpy(flags) if split else None
    rows = reference.ngram_rows(torch.from_numpy(tokens)[None], 64, leading, trigram)
    used = Counter()  # (bucket, context)
    for order, row in enumerate(r for r in rows if r is not None):
        for at in range(order + 1, len(tokens)):
            used[int(row[0, at]), (order, *tokens[at - order - 1 : at + 1].tolist())] += 1
    result = contexts_of(config, tokens, flags)
    assert sorted(result.counts.tolist()) == sorted(used.values())
    in_bucket = Counter(bucket for bucket, _ in used)
    total = Counter()
    for (bucket, _), count in used.items():
        total[bucket] += count
    seen = 0
    for kind, order, chosen in groups(result):
        mine = {
            key: count
            for key, count in used.items()
            if key[1][0] == ORDERS.index(order) and flags[key[1][-1]] == (kind == "word start")
        }
        number = sum(mine.values())
        company = sum(count * in_bucket[bucket] for (bucket, _), count in mine.items()) / number
        foreign = sum(count * (1 - count / total[bucket]) for (bucket, _), count in mine.items()) / number
        got = load(result, chosen)
        assert (got.occurrences, got.contexts) == (number, len(mine))
        assert got.occupied == len({bucket for bucket, _ in mine})
        assert got.contexts_in_bucket == pytest.approx(company)
        assert got.foreign == pytest.approx(foreign)
        seen += number
    assert seen == sum(used.values())


def test_an_ideal_hash_fills_buckets_at_random(text):
    tokens, flags = text
    result = contexts_of(config_of(True, False, rows=4096), tokens, flags)
    for _, _, chosen in groups(result):
        ideal = ideal_load(result, chosen)
        buckets, contexts = 2047, int(chosen.sum())
        assert ideal.occupied == pytest.approx(buckets * (1 - (1 - 1 / buckets) ** contexts), rel=0.03)
        assert ideal.contexts == contexts
    drawn = result.ideally_hashed(np.random.default_rng(0)).buckets
    assert drawn[result.starts].max() < 2047 <= drawn[~result.starts].min()
    assert drawn.max() < 2 * 2047


def test_layouts_need_no_model(text):
    tokens, flags = text
    published, real = analyze_layouts({"mine": config_of(True, True)}, tokens, flags)
    assert (published.form, real.form) == ("published", "corrected")
    assert list(published.values) == ["63 shared", "63 shared, trigrams", "63 split", "63 split, trigrams"]
    assert {row[:2] for row in published.table.rows if row[1] != "-"} == {("63 split, trigrams", "mine")}
    observed = real.values["layouts"]["63 split"]
    assert [one["observed"]["occurrences"] for one in observed] == [
        int(flags[tokens[1:]].sum()),
        int((~flags)[tokens[1:]].sum()),
    ]
    with pytest.raises(PgolfError, match="no hash table"):
        contexts_of(tiny_config(bigram_vocab_size=0, trigram=False), tokens, flags)
    with pytest.raises(PgolfError, match="at least 3 tokens"):
        contexts_of(config_of(True, True), tokens[:2], flags)


@pytest.fixture(scope="module")
def model():
    flags = torch.arange(96) % 3 == 0
    return randomize_(GPT(tiny_config(), flags), 0)


@torch.no_grad()
def test_without_a_part_matches_a_model_that_lacks_it(model):
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = model.logits(tokens)
    state = model.state_dict()
    others = {
        TRIGRAM: GPT(tiny_config(trigram=False), model.has_leading_space),
        GATE: GPT(tiny_config(), model.has_leading_space),
        TABLE: GPT(tiny_config(bigram_vocab_size=0, trigram=False), model.has_leading_space),
    }
    for part, other in others.items():
        other.load_state_dict(
            {name: state[name] for name in other.state_dict()}
            | ({"word_start_boost": torch.tensor(1.0)} if part == GATE else {})
        )
        with _without(model, part):
            torch.testing.assert_close(model.logits(tokens), other.logits(tokens))
            assert not torch.allclose(model.logits(tokens), whole, atol=1e-3)
        assert torch.equal(model.logits(tokens), whole)


def test_a_part_comes_back_after_an_error(model):
    with pytest.raises(RuntimeError), _without(model, TABLE):
        raise RuntimeError
    assert model.bigram.scale.item() != 0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model with random weights in a run folder, and its data."""
    config = run_config(make_dataset(tmp_path_factory.mktemp("data")))
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "one")
    folder.write_config(config)
    save_tensors(folder.model_file, randomize_(GPT(config.model), 3).state_dict(), {})
    return open_model(folder.path)


def by_name(summaries):
    return {(summary.name, summary.form): summary for summary in summaries}


def test_findings_of_a_run(loaded, monkeypatch):
    monkeypatch.setattr("pgolf_fast.lab.analysis.hash_table.draw", lambda *a, **k: {"buckets": b"PNG"})
    result = by_name(analyze([loaded], Options(tokens=640, hash_rows=(128,))))
    assert "127 split" in result["buckets on real tokens", "corrected"].values["layouts"]
    assert list(result) == [
        ("contexts per bucket, all n-grams", "published"),
        ("buckets on real tokens", "corrected"),
        ("learned scale and gate", "published"),
        ("what the table adds", "corrected"),
        ("loss without the gate", "published"),
        ("loss without parts of the table", "corrected"),
    ]
    for summary in result.values():
        json.dumps(summary.values, allow_nan=False)
    learned = result["learned scale and gate", "published"].values["one"]
    state = loaded.state
    assert learned == {"scale": state["bigram.scale"].item(), "boost": state["word_start_boost"].item()}
    gate = result["loss without the gate", "published"].values["one"]
    worth = result["loss without parts of the table", "corrected"].values["one"]
    assert set(worth) == {"", GATE, TRIGRAM, TABLE}
    assert gate["nats"] == pytest.approx(worth[GATE]["nats"])
    assert gate["bits_per_token"] == pytest.approx(
        gate["nats"] / math.log(2)
    )  # published as bpb, but per token
    assert worth[GATE]["low"] <= worth[GATE]["bpb"] <= worth[GATE]["high"]
    stream = open_validation([loaded], Options(tokens=640)).stream(torch.device("cpu"))
    tokens_a_byte = stream.num_targets / stream.target_bytes.sum()
    for part in (GATE, TRIGRAM, TABLE):
        assert worth[part]["bpb"] == pytest.approx(worth[part]["nats"] * tokens_a_byte / math.log(2))


def test_what_the_table_adds_scales_with_its_output(loaded, monkeypatch):
    monkeypatch.setattr("pgolf_fast.lab.analysis.hash_table.draw", lambda *a, **k: {})
    result = by_name(analyze([loaded], Options(tokens=640)))["what the table adds", "corrected"]
    double = dict(loaded.state)
    double["bigram.scale"] = 2 * double["bigram.scale"]
    other = LoadedModel("two", loaded.path, double, loaded.config, loaded.folder)
    again = by_name(analyze([other], Options(tokens=640)))["what the table adds", "corrected"]
    for kind in ("word start", "other"):
        one, two = result.values["one"][kind], again.values["two"][kind]
        assert two["table"] == pytest.approx(2 * one["table"], rel=1e-5)
        assert two["token"] == pytest.approx(one["token"])


def test_a_model_without_a_table_is_refused(loaded):
    bare = RunConfig(name="bare", model=tiny_config(bigram_vocab_size=0, trigram=False))
    other = LoadedModel("bare", loaded.path, {}, bare, None)
    with pytest.raises(PgolfError, match=r"bare: no hash table \(model.bigram_vocab_size is 0\)"):
        analyze([other], Options())
