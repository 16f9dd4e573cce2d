import pytest
import torch
from helpers import assert_as_accurate, assert_matches_float64, lay_out, results

from pgolf_fast.ops import ngram_hash_embed, reference

SHAPES = [((4, 16), 32), ((3, 7), 5), ((1, 1), 1), ((2, 2), 3), ((0, 5), 4), ((2, 0), 4)]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]  # pos_conditional, trigram
VOCAB, ROWS = 50, 23


def make(shape, dim, dtype=torch.float32, device="cpu"):
    """tokens, table, word starts, scale and boost (float32 scalars, as in the network)."""
    tokens = torch.randint(VOCAB, shape, device=device)
    table = torch.randn(ROWS, dim, device=device).to(dtype)
    starts = torch.rand(VOCAB, device=device) < 0.4
    return [tokens, table, starts, torch.tensor(0.7, device=device), torch.tensor(1.3, device=device)]


def rows_of(tokens, starts=None, num_rows=4096, trigram=False):
    """Row numbers of one sequence, read through the public op from a table that holds its own row numbers."""
    table = torch.arange(num_rows, dtype=torch.float64).unsqueeze(1)
    one, split = torch.ones((), dtype=torch.float64), starts is not None
    embed = [
        ngram_hash_embed(torch.tensor([tokens]), table, starts, one, one, pos_conditional=split, trigram=t)
        for t in (False, True)
    ]
    return (embed[1] - embed[0] if trigram else embed[0]).flatten().long().tolist()


def split_rows(tokens, starts, num_rows, trigram):
    """The definition once more, in Python's integers."""
    usable, out = num_rows - 1, []
    for i, token in enumerate(tokens):
        if i < (2 if trigram else 1):
            out.append(usable)
            continue
        key = (36313 * token) ^ (27191 * tokens[i - 1])
        if trigram:
            key ^= 51497 * tokens[i - 2]
        half = usable // 2
        out.append(key % usable if starts is None else key % half + (0 if starts[token] else half))
    return out


@pytest.mark.parametrize(
    ("previous", "current", "start", "other", "plain"),
    [
        (0, 0, 0, 2047, 0),
        (1, 2, 435, 2482, 412),
        (1, 300, 1351, 3398, 2784),
        (300, 1, 1357, 3404, 3452),
        (512, 511, 1047, 3094, 1821),
        (1023, 1023, 977, 3024, 476),
        (17, 999, 577, 2624, 1874),
        (999, 17, 689, 2736, 315),
    ],
)
def test_bigram_rows(previous, current, start, other, plain):
    """Rows worked out by hand for PR 1501."""
    pair = [previous, current]
    assert rows_of(pair, torch.ones(1024, dtype=torch.bool)) == [4095, start]
    assert rows_of(pair, torch.zeros(1024, dtype=torch.bool)) == [4095, other]
    assert rows_of(pair) == [4095, plain]


@pytest.mark.parametrize(
    ("tokens", "start", "other"),
    [([1, 2, 3], 1282, 3329), ([5, 6, 7], 182, 2229), ([1023, 0, 512], 2028, 4075)],
    ids=str,
)
def test_trigram_rows(tokens, start, other):
    assert rows_of(tokens, torch.ones(1024, dtype=torch.bool), trigram=True) == [4095, 4095, start]
    assert rows_of(tokens, torch.zeros(1024, dtype=torch.bool), trigram=True) == [4095, 4095, other]


def test_sequence_with_one_word_start():
    starts = torch.zeros(1024, dtype=torch.bool)
    starts[5] = True
    assert rows_of([1023, 1023, 0, 5, 7], starts) == [4095, 3024, 3804, 1429, 3129]


@pytest.mark.parametrize("trigram", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("num_rows", [4, 5, 4096, 10240])
def test_rows_near_the_largest_ids(num_rows, split, trigram):
    """Products of ids near 2^16 pass 2^31, and ids near 2^31 pass 2^32: the key is 64 bits wide."""
    tokens = [65535, 65535, 65534, 0, 65535, 1, 59139, 60000, 65535]
    starts = torch.zeros(65536, dtype=torch.bool)
    starts[::3] = True
    if not split:
        tokens += [2**31 - 1, 2**31 - 2, 2**31 - 1]
    got = rows_of(tokens, starts if split else None, num_rows, trigram)
    assert got == split_rows(tokens, starts.tolist() if split else None, num_rows, trigram)


def test_halves_do_not_meet():
    """Word starts never share a row with other tokens; only position 0 uses the last row."""
    ids = torch.randint(1024, (4000,)).tolist()
    for start, rows in ((True, range(0, 2047)), (False, range(2047, 4094))):
        got = rows_of(ids, torch.full((1024,), start))
        assert got[0] == 4095
        assert set(got[1:]) <= set(rows)
        assert len(set(got[1:])) > 1500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pos_conditional", "trigram"), VARIANTS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_matches_reference(shape, dim, pos_conditional, trigram, dtype, device):
    inputs = make(shape, dim, dtype, device)
    assert_matches_float64(
        lambda *t: ngram_hash_embed(*t, pos_conditional=pos_conditional, trigram=trigram),
        lambda *t: reference.ngram_hash_embed(*t, pos_conditional, trigram).to(t[1].dtype),
        inputs,
    )


@pytest.mark.parametrize("trigram", [False, True])
def test_without_word_starts(trigram, device):
    """No gate: boost has no effect and a zero gradient."""
    tokens, table, _, scale, boost = make((3, 9), 6, device=device)
    got, grads, douts = results(
        lambda *t: ngram_hash_embed(t[0], t[1], None, t[2], t[3], pos_conditional=False, trigram=trigram),
        (tokens, table, scale, boost),
    )
    want, wants, _ = results(
        lambda *t: reference.ngram_hash_embed(t[0], t[1], None, t[2], boost, False, trigram),
        (tokens, table, scale),
        douts,
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads[:2], wants)
    assert grads[2] == 0


@pytest.mark.parametrize(
    ("table_dtype", "out_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_out_dtype(table_dtype, out_dtype, device):
    tokens, table, starts, scale, boost = make((3, 9), 6, table_dtype, device)
    out = ngram_hash_embed(
        tokens, table, starts, scale, boost, pos_conditional=True, trigram=True, out_dtype=out_dtype
    )
    exact = reference.ngram_hash_embed(
        tokens, table.double(), starts, scale.double(), boost.double(), True, True
    )
    assert out.dtype == out_dtype
    assert_as_accurate(out, exact.to(out_dtype), exact)


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_inputs(layout, token_dtype, device):
    tokens, table, starts, scale, boost = make((4, 6), 5, device=device)
    tokens, table = lay_out(layout, (tokens.to(token_dtype), table))
    starts = torch.stack((starts, ~starts), dim=1)[:, 0]
    assert not tokens.is_contiguous()
    assert not table.is_contiguous()

    def op(*t):
        return ngram_hash_embed(*t, pos_conditional=True, trigram=True)

    def formula(*t):
        return reference.ngram_hash_embed(*t, True, True)

    inputs = (tokens, table, starts, scale, boost)
    dout = torch.randn(4, 5, 6, device=device).mT
    (got,), grads, _ = results(op, inputs, [dout])
    (want,), wants, _ = results(formula, [t.contiguous() for t in inputs], [dout])
    torch.testing.assert_close((got, grads), (want, wants))


@pytest.mark.parametrize(("pos_conditional", "trigram"), VARIANTS)
def test_opcheck(pos_conditional, trigram, device):
    tokens, table, starts, scale, boost = make((3, 7), 5, device=device)
    for words in (starts, None) if not pos_conditional else (starts,):
        leaves = [t.detach().requires_grad_() for t in (table, scale, boost)]
        args = (tokens, leaves[0], words, *leaves[1:], pos_conditional, trigram, torch.float32)
        torch.library.opcheck(torch.ops.pgolf.ngram_hash_embed, args)
        backward = (
            torch.randn(3, 7, 5, device=device),
            tokens,
            table,
            words,
            scale,
            boost,
            pos_conditional,
            trigram,
        )
        torch.library.opcheck(torch.ops.pgolf.ngram_hash_embed_backward, backward)


@pytest.mark.parametrize(("pos_conditional", "trigram"), VARIANTS)
def test_gradcheck(pos_conditional, trigram):
    tokens, table, starts, scale, boost = make((2, 5), 3)
    leaves = [t.double().requires_grad_() for t in (table, scale, boost)]
    torch.autograd.gradcheck(
        lambda t, s, b: ngram_hash_embed(
            tokens, t, starts, s, b, pos_conditional=pos_conditional, trigram=trigram
        ),
        leaves,
    )


def test_compiles_without_graph_break(device):
    tokens, table, starts, scale, boost = make((3, 7), 5, torch.bfloat16, device)

    def run(table, scale, boost):
        options = {"pos_conditional": True, "trigram": True, "out_dtype": torch.float32}
        return ngram_hash_embed(tokens, table, starts, scale, boost, **options).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, wants, douts = results(run, (table, scale, boost))
    got, grads, _ = results(compiled, (table, scale, boost), douts)
    torch.testing.assert_close((got, grads), (want, wants))


def test_rejects_bad_input():
    tokens, table, starts, scale, boost = make((3, 7), 5)
    plain = {"pos_conditional": False, "trigram": True}
    with pytest.raises(ValueError, match=r"ngram_hash_embed: tokens\.shape is \(7,\), but \(any, any\)"):
        ngram_hash_embed(tokens[0], table, starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"table\.shape is \(23, 5, 1\)"):
        ngram_hash_embed(tokens, table[..., None], starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"tokens\.dtype is torch\.float32; it must be an integer type"):
        ngram_hash_embed(tokens.float(), table, starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"table has 3 rows; it needs at least 4"):
        ngram_hash_embed(tokens, table[:3], starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"pos_conditional needs has_leading_space, which is None"):
        ngram_hash_embed(tokens, table, None, scale, boost, pos_conditional=True, trigram=True)


@pytest.mark.parametrize(("pos_conditional", "trigram"), VARIANTS)
def test_later_tokens_are_not_in_the_key(pos_conditional, trigram, device):
    """The target is the next token: no row may depend on it, nor reach back further than its order."""
    tokens, table, starts, scale, boost = make((1, 12), 8, device=device)

    def embed(t):
        return ngram_hash_embed(
            t, table, starts, scale, boost, pos_conditional=pos_conditional, trigram=trigram
        )

    want, order = embed(tokens), 3 if trigram else 2
    for position in range(12):
        touched = torch.zeros(12, dtype=torch.bool, device=device)
        for shift in range(1, 20):
            changed = tokens.clone()
            changed[:, position] = (tokens[:, position] + shift) % VOCAB
            touched |= (embed(changed) != want).any(-1).flatten()
        assert touched.nonzero().flatten().tolist() == list(range(position, min(position + order, 12)))


def test_sequences_are_separate(device):
    tokens, table, starts, scale, boost = make((3, 6), 5, device=device)
    whole, alone = (
        ngram_hash_embed(t, table, starts, scale, boost, pos_conditional=True, trigram=True)
        for t in (tokens, tokens[1:2])
    )
    assert torch.equal(whole[1:2], alone)
