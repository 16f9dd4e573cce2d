import pytest
import torch
from helpers import assert_as_accurate, assert_matches_float64, lay_out, results

from pgolf_fast.ops import ngram_hash, ngram_hash_embed, reference, tiles

HAS_KERNELS = True
# interpreted tiles are 32 tokens by 32 columns: the second shape has partial tiles in both dimensions
SHAPES = [((4, 16), 32), ((3, 23), 40), ((3, 7), 5), ((1, 1), 1), ((2, 2), 3), ((0, 5), 4), ((2, 0), 4)]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]  # pos_conditional, trigram
VOCAB, ROWS = 50, 13


def make(shape, dim, dtype=torch.float32, device="cpu"):
    """tokens, table, word starts, scale and boost (float32 scalars, as in the network)."""
    tokens = torch.randint(VOCAB, shape, device=device)
    table = torch.randn(ROWS, dim, device=device).to(dtype)
    starts = torch.rand(VOCAB, device=device) < 0.4
    return [tokens, table, starts, torch.tensor(0.7, device=device), torch.tensor(1.3, device=device)]


def rows_of(tokens, starts=None, num_rows=4096, trigram=False, device="cpu"):
    """Row numbers of one sequence, read through the public op from a table that holds its own row numbers."""
    table = torch.arange(num_rows, dtype=torch.float32, device=device).unsqueeze(1)
    one, split = torch.ones((), device=device), starts is not None
    tokens = torch.tensor([tokens], device=device)
    starts = starts if starts is None else starts.to(device)
    embed = [
        ngram_hash_embed(tokens, table, starts, one, one, pos_conditional=split, trigram=t)
        for t in (False, True)
    ]
    return (embed[1] - embed[0] if trigram else embed[0]).flatten().long().tolist()


def split_rows(tokens, starts, num_rows, trigram):
    """The definition again, in Python integers."""
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
def test_bigram_rows(previous, current, start, other, plain, device):
    """Rows worked out by hand for PR 1501."""
    pair = [previous, current]
    assert rows_of(pair, torch.ones(1024, dtype=torch.bool), device=device) == [4095, start]
    assert rows_of(pair, torch.zeros(1024, dtype=torch.bool), device=device) == [4095, other]
    assert rows_of(pair, device=device) == [4095, plain]


@pytest.mark.parametrize(
    ("tokens", "start", "other"),
    [([1, 2, 3], 1282, 3329), ([5, 6, 7], 182, 2229), ([1023, 0, 512], 2028, 4075)],
    ids=str,
)
def test_trigram_rows(tokens, start, other, device):
    for flag, row in ((True, start), (False, other)):
        starts = torch.full((1024,), flag)
        assert rows_of(tokens, starts, trigram=True, device=device) == [4095, 4095, row]


def test_sequence_with_one_word_start(device):
    starts = torch.zeros(1024, dtype=torch.bool)
    starts[5] = True
    assert rows_of([1023, 1023, 0, 5, 7], starts, device=device) == [4095, 3024, 3804, 1429, 3129]


@pytest.mark.pairwise
@pytest.mark.parametrize("trigram", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("num_rows", [4, 5, 4096, 10240])
def test_rows_near_the_largest_ids(num_rows, split, trigram, device):
    """Products of ids near 2^16 pass 2^31, and ids near 2^31 pass 2^32: the key is 64 bits wide."""
    tokens = [65535, 65535, 65534, 0, 65535, 1, 59139, 60000, 65535]
    starts = torch.zeros(65536, dtype=torch.bool)
    starts[::3] = True
    if not split:
        tokens += [2**31 - 1, 2**31 - 2, 2**31 - 1]
    got = rows_of(tokens, starts if split else None, num_rows, trigram, device)
    assert got == split_rows(tokens, starts.tolist() if split else None, num_rows, trigram)


def test_halves_do_not_meet():
    """Word starts never share a row with other tokens; only position 0 uses the last row."""
    ids = torch.randint(1024, (4000,)).tolist()
    for start, rows in ((True, range(0, 2047)), (False, range(2047, 4094))):
        got = rows_of(ids, torch.full((1024,), start))
        assert got[0] == 4095
        assert set(got[1:]) <= set(rows)
        assert len(set(got[1:])) > 1500


@pytest.mark.pairwise
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "vocab"),
    [((3, 50), 1), ((2, 75), 3), ((1100, 1), VOCAB)],
    ids=["one bigram", "few bigrams", "no bigram"],
)
def test_rows_in_many_tokens(shape, vocab, dtype, device):
    """Few rows with all entries, some with more than 32 pieces of 32 entries: sums over pieces."""
    _, table, starts, scale, boost = make(shape, 3, dtype, device)
    inputs = [torch.randint(vocab, shape, device=device), table, starts, scale, boost]
    assert_matches_float64(
        lambda *t: ngram_hash_embed(*t, pos_conditional=True, trigram=True),
        lambda *t: reference.ngram_hash_embed(*t, True, True).to(t[1].dtype),
        inputs,
        factor=8.0,  # sums of thousands of numbers, one after the other in PyTorch's index_add_
    )


@pytest.mark.parametrize("num_rows", [4, 5, 100])
def test_small_and_large_tables(num_rows, device):
    """Tables with all rows in use, and one with few rows in use."""
    tokens, _, starts, scale, boost = make((2, 40), 1, device=device)
    inputs = [tokens, torch.randn(num_rows, 7, device=device), starts, scale, boost]
    assert_matches_float64(
        lambda *t: ngram_hash_embed(*t, pos_conditional=True, trigram=True),
        lambda *t: reference.ngram_hash_embed(*t, True, True),
        inputs,
    )


def test_table_gradient_is_the_same_every_time(device):
    inputs = make((5, 40), 9, device=device)

    def op(*t):
        return ngram_hash_embed(*t, pos_conditional=False, trigram=True)

    _, grads, douts = results(op, inputs)
    for got, want in zip(results(op, inputs, douts)[1], grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("pos_conditional", "trigram"), VARIANTS)
def test_atomic_table_gradient(pos_conditional, trigram, device, monkeypatch):
    inputs = make((3, 23), 40, device=device)

    def op(*t):
        return ngram_hash_embed(*t, pos_conditional=pos_conditional, trigram=trigram)

    def formula(*t):
        return reference.ngram_hash_embed(*t, pos_conditional, trigram)

    monkeypatch.setattr(ngram_hash, "_table_gradient", "sorted")  # restored after the test
    ngram_hash.choose_table_gradient("atomic")
    monkeypatch.setattr(ngram_hash, "_sorted_sums", None)
    torch.use_deterministic_algorithms(False)
    assert_matches_float64(op, formula, inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if tiles.uses_kernels("ngram_hash_embed", inputs[1]):
        with pytest.raises(TypeError, match="not callable"):  # the sorted sum was asked for
            results(op, inputs)


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


@pytest.mark.parametrize("token_dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_token_dtypes(token_dtype, device):
    tokens, *others = make((4, 6), 5, device=device)
    options = {"pos_conditional": True, "trigram": True}
    got = results(lambda *t: ngram_hash_embed(tokens.to(token_dtype), *t, **options), others)
    want = results(lambda *t: ngram_hash_embed(tokens, *t, **options), others, got[2])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**31 - 1])
def test_token_without_word_start_entry(wrong, device):
    """Kernels do not check, which would synchronize: only that token's row is NaN."""
    tokens, *others = make((3, 7), 5, device=device)
    options = {"pos_conditional": True, "trigram": True}
    want = ngram_hash_embed(tokens, *others, **options)
    tokens[1, 6] = wrong
    if device == "cpu":
        with pytest.raises(IndexError, match=f"tokens hold {wrong}, but has_leading_space has ids 0 to 49"):
            ngram_hash_embed(tokens, *others, **options)
        if not tiles.uses_kernels("ngram_hash_embed", others[0]):
            return
    call = ngram_hash._Call(tokens, *others, True, True)
    got = ngram_hash._forward_cuda(call, torch.empty_like(want))
    assert torch.isnan(got[1, 6]).all()
    got[1, 6] = want[1, 6]
    assert torch.equal(got, want)


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
    table = table[:6].contiguous()
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
    with pytest.raises(ValueError, match=r"table\.shape is \(13, 5, 1\)"):
        ngram_hash_embed(tokens, table[..., None], starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"tokens\.dtype is torch\.float32; it must be an integer type"):
        ngram_hash_embed(tokens.float(), table, starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"table has 3 rows; it needs at least 4"):
        ngram_hash_embed(tokens, table[:3], starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"pos_conditional needs has_leading_space, which is None"):
        ngram_hash_embed(tokens, table, None, scale, boost, pos_conditional=True, trigram=True)
    with pytest.raises(ValueError, match=r"table\.dtype is torch\.int64, but a floating-point type"):
        ngram_hash_embed(tokens, table.long(), starts, scale, boost, **plain)
    with pytest.raises(ValueError, match=r"has_leading_space\.dtype is torch\.uint8, but torch\.bool"):
        ngram_hash_embed(tokens, table, starts.byte(), scale, boost, **plain)
    with pytest.raises(ValueError, match=r"has_leading_space\.shape is \(50, 1\), but \(any,\)"):
        ngram_hash_embed(tokens, table, starts[:, None], scale, boost, **plain)
    with pytest.raises(ValueError, match=r"scale\.shape is \(1,\), but \(\) is needed"):
        ngram_hash_embed(tokens, table, starts, scale[None], boost, **plain)
    with pytest.raises(ValueError, match=r"boost\.shape is \(1,\), but \(\) is needed"):
        ngram_hash_embed(tokens, table, starts, scale, boost[None], **plain)
    with pytest.raises(ValueError, match=r"boost\.device is meta, but tokens\.device is cpu"):
        ngram_hash_embed(tokens, table, starts, scale, boost.to("meta"), **plain)
    with pytest.raises(ValueError, match=r"has_leading_space\.device is meta, but tokens\.device is cpu"):
        ngram_hash_embed(tokens, table, starts.to("meta"), scale, boost, **plain)
    with pytest.raises(ValueError, match=r"table gradient is 'fast'; use sorted or atomic"):
        ngram_hash.choose_table_gradient("fast")


@pytest.mark.parametrize(("pos_conditional", "trigram"), VARIANTS)
def test_later_tokens_are_not_in_the_key(pos_conditional, trigram, device):
    """No row depends on the next token, the target, or reaches back further than its order."""
    tokens, table, starts, scale, boost = make((1, 12), 8, device=device)

    def embed(t):
        return ngram_hash_embed(
            t, table, starts, scale, boost, pos_conditional=pos_conditional, trigram=trigram
        )

    want, order = embed(tokens), 3 if trigram else 2
    for position in range(12):
        changed = tokens.repeat(19, 1)
        changed[:, position] = (tokens[:, position] + torch.arange(1, 20, device=device)) % VOCAB
        touched = (embed(changed) != want).any(-1).any(0)
        assert touched.nonzero().flatten().tolist() == list(range(position, min(position + order, 12)))


def test_sequences_are_separate(device):
    tokens, table, starts, scale, boost = make((3, 6), 5, device=device)
    whole, alone = (
        ngram_hash_embed(t, table, starts, scale, boost, pos_conditional=True, trigram=True)
        for t in (tokens, tokens[1:2])
    )
    assert torch.equal(whole[1:2], alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("num_rows", "dim"), [(4096, 64), (3072, 112)])
def test_real_tiles_on_a_gpu(num_rows, dim):
    """A micro-batch of exp101, float32 table to bfloat16 rows, with frequent bigrams."""
    ids = (torch.rand(48, 2048, device="cuda") ** 8 * 1024).long()
    table = torch.randn(num_rows, dim, device="cuda")
    _, _, _, scale, boost = make((1, 1), 1, device="cuda")
    inputs = [ids, table, torch.rand(1024, device="cuda") < 0.4, scale, boost]
    options = {"pos_conditional": True, "trigram": True, "out_dtype": torch.bfloat16}
    out, grads, douts = results(lambda *t: ngram_hash_embed(*t, **options), inputs)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    want, wants, _ = results(lambda *t: reference.ngram_hash_embed(*t, True, True), exact, douts)
    torch.testing.assert_close(out[0].double(), want[0], rtol=2**-8, atol=1e-6)
    for got, exact_grad in zip(grads, wants, strict=True):
        largest = exact_grad.abs().max().item()
        torch.testing.assert_close(got.double(), exact_grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """The last tokens' rows have offsets that exceed 32 bits."""
    tokens, table, starts, scale, boost = make((2**31 // (64 * 1024) + 2, 1024), 64, torch.bfloat16, "cuda")
    inputs, options = (table, starts, scale, boost), {"pos_conditional": True, "trigram": True}
    got = ngram_hash_embed(tokens, *inputs, **options)[-2:]
    torch.testing.assert_close(got, ngram_hash_embed(tokens[-2:], *inputs, **options), rtol=0, atol=0)
