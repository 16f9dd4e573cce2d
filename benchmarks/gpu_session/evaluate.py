"""Session part `eval`: scoring and test-time training, ours against the same model in plain PyTorch.

E1: one chunk of legal test-time training at the preset's settings (exp101: 1,024 windows of 2,048 scored,
then four epochs of two steps), each contender in a process of its own, written at once. E2: scoring alone,
with and without cutting the last block to the scored positions, and the difference of their losses. Plain
contenders score all positions in the batch size of the published run, ours choose theirs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive_eval
from benchmarks.gpu_session.plain import plain_banks, plain_loss, plain_ops
from benchmarks.gpu_session.session import PartFile, Session, each_alone, measure_way, timed
from benchmarks.gpu_session.step import dry_model, make_model, markov_tokens
from pgolf_fast.bench.peers import compile_settings
from pgolf_fast.bench.run import attempt
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.tokenizer import ByteTable
from pgolf_fast.evaluation.adapters.base import Frozen, Scored
from pgolf_fast.evaluation.adapters.descent import SGD, trainable_parameters
from pgolf_fast.evaluation.estimate import forward_flops
from pgolf_fast.evaluation.score import Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import Windows, sliding_windows
from pgolf_fast.model.compiled import tag_compile_cache
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops.tuned import load_tuned

PLAIN_BATCH = 128  # windows, as in the published run


@dataclass(frozen=True)
class Contender:
    """One implementation of evaluation."""

    name: str
    ours: bool
    compile: bool
    dry: bool = False  # also run in a rehearsal


# Most important first: when time is short, the last are left out.
CONTENDERS = (
    Contender("ours, eager", True, False, dry=True),
    Contender("ours, compile and CUDA graph", True, True),
    Contender("plain, compile", False, True),
    Contender("plain, eager", False, False, dry=True),
)
ROUNDS = 7


@dataclass
class Chunk:
    """The windows and tokens of one chunk after the first."""

    stream: Stream
    windows: Windows
    tokens: Tensor
    config: RunConfig

    @property
    def seq_len(self) -> int:
        return self.config.eval_seq_len


@dataclass
class Runner:
    """A contender that is compiled and ready."""

    score: Callable[[], Tensor]
    adapt: Callable[[], None]

    def measured(self, rounds: int) -> dict[str, Any]:
        """Score and adapt in turn; return the times of every round, and the mean loss of the first."""
        scored = [(*timed(self.score), timed(self.adapt)[1]) for _ in range(rounds)]
        loss = scored[0][0].double().mean().item()
        return {"score_ms": [s for _, s, _ in scored], "adapt_ms": [a for *_, a in scored], "loss": loss}


def run_config(session: Session) -> RunConfig:
    """Return the preset with test-time training of float banks, which both sides can do."""
    config = preset(session.preset)
    ttt = replace(config.ttt, quantize_forward="none", parameters="banks")
    if not session.dry:
        return replace(config, ttt=ttt)
    ttt = replace(ttt, chunk_tokens=128, batch_seqs=2)
    return replace(config, model=dry_model(config), ttt=ttt, eval=replace(config.eval, seq_len=32, stride=8))


def make_chunk(config: RunConfig, device: torch.device) -> Chunk:
    vocab, size = config.model.vocab_size, config.ttt.chunk_tokens
    ids = markov_tokens(vocab, 1, 2 * size + 1)[0]
    ones = torch.ones(vocab, dtype=torch.int16).numpy()
    stream = Stream(ids, ByteTable(ones, ones > 1, ones > 1), device)
    windows = sliding_windows(stream.num_targets, config.eval_seq_len, config.eval.stride)
    inside = (windows.first >= size) & (windows.first < 2 * size)
    return Chunk(stream, windows[inside], stream.tokens[size : 2 * size + 1].clone(), config)


def prepare(contender: Contender, chunk: Chunk, session: Session) -> Runner:
    """Compile and capture everything by one round; its update of the weights is kept."""
    model = make_model(chunk.config, session.device)
    runner = (ours if contender.ours else plain)(contender, chunk, model)
    runner.score()
    runner.adapt()
    return runner


def make_scorer(chunk: Chunk, model: GPT) -> Scorer:
    config = chunk.config
    size = batch_size(config.eval.batch_seqs, config.model, model.compute_dtype, model.qo_bank.device)
    return Scorer(chunk.stream, chunk.windows, chunk.seq_len, size)


def ours(contender: Contender, chunk: Chunk, model: GPT) -> Runner:
    config, device, scorer = chunk.config, model.qo_bank.device, make_scorer(chunk, model)
    graph = contender.compile and device.type == "cuda"
    adapter = SGD(model, config.ttt, chunk.seq_len, None, compile=contender.compile, cuda_graph=graph)

    def score() -> Tensor:
        scorer.score(adapter.score, 0, len(chunk.windows))
        return scorer.losses

    return Runner(score, lambda: adapter.adapt(Scored(chunk.tokens[None], 1, 947)))


def plain(contender: Contender, chunk: Chunk, model: GPT) -> Runner:
    parameters = trainable_parameters(model, chunk.config.ttt)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters))

    def token_losses(x: Tensor, y: Tensor) -> Tensor:
        return model.token_losses(x, y, plain_banks(model))

    mean_loss = plain_loss(model)
    if contender.compile:
        settings = compile_settings("compile")
        token_losses = torch.compile(token_losses, dynamic=False, fullgraph=True, **settings)
        mean_loss = torch.compile(mean_loss, dynamic=False, fullgraph=True, **settings)
    learner = naive_eval.SGD(mean_loss, parameters, chunk.config.ttt, chunk.seq_len)

    def score() -> Tensor:
        with plain_ops():
            return naive_eval.score(
                token_losses, chunk.stream.tokens, chunk.windows, chunk.seq_len, PLAIN_BATCH
            )

    def adapt() -> None:
        with plain_ops():
            learner.adapt(chunk.tokens, 1, 947)

    return Runner(score, adapt)


def rows(measured: dict[str, dict[str, Any]], chunk: Chunk) -> list[dict[str, object]]:
    """Return one record per contender: E1, its two parts, and the time of 947 chunks."""
    found = []
    positions = len(chunk.windows) * chunk.seq_len
    rounds = {name: list(zip(m["score_ms"], m["adapt_ms"], strict=True)) for name, m in measured.items()}
    chunk_ms = {name: statistics.median(map(sum, both)) for name, both in rounds.items()}
    eager, compiled = chunk_ms.get("plain, eager"), chunk_ms.get("plain, compile")
    for name, both in chunk_ms.items():
        score = statistics.median(measured[name]["score_ms"])
        found.append(
            {
                "contender": name,
                "chunk_ms": both,
                "score_ms": score,
                "adapt_ms": statistics.median(measured[name]["adapt_ms"]),
                "positions_per_second": positions / score * 1e3,
                "seconds_of_947_chunks": 0.947 * both,
                "plain_eager_over_this": eager and eager / both,
                "plain_compile_over_this": compiled and compiled / both,
                "rounds": rounds[name],
            }
        )
    return found


def cut_or_whole(chunk: Chunk, session: Session) -> dict[str, object]:
    """E2: score with and without the cut, in turn, on the same weights."""
    config, model = chunk.config, make_model(chunk.config, session.device)
    frozen = Frozen(model, compile=not session.dry)

    def whole(tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        rest = tokens[:, 1 : tokens.shape[1] - targets.shape[1] + 1]
        return frozen.score(tokens, torch.cat((rest, targets), dim=1), context)[:, rest.shape[1] :]

    scorers = {contender: make_scorer(chunk, model) for contender in ("cut", "whole")}
    losses = {"cut": frozen.score, "whole": whole}
    ms: dict[str, list[float]] = {contender: [] for contender in scorers}
    for i in range(6):
        for contender, scorer in scorers.items():
            taken = timed(lambda: scorer.score(losses[contender], 0, len(chunk.windows)))[1]  # noqa: B023 - called now
            ms[contender] += [taken] if i else []
    cut, whole_losses = (scorer.losses.double() for scorer in scorers.values())
    median = {contender: statistics.median(times) for contender, times in ms.items()}
    return {
        "windows_a_batch": scorers["cut"].size(chunk.seq_len),
        "ms": ms,
        "median_ms": median,
        "speed_up": median["whole"] / median["cut"],
        "speed_up_allowed": forward_flops(config.model, chunk.seq_len, chunk.seq_len)
        / forward_flops(config.model, chunk.seq_len, config.eval.stride),
        "largest_difference_nats": (cut - whole_losses).abs().max().item(),
        "difference_of_means_nats": (cut.mean() - whole_losses.mean()).abs().item(),
    }


def run_way(session: Session) -> bool:
    """Measure one contender, for `each_alone` in another process."""
    (contender,) = (one for one in CONTENDERS if one.name == session.way)
    chunk = make_chunk(run_config(session), session.device)
    rounds = 2 if session.dry else ROUNDS
    return measure_way(session, lambda: prepare(contender, chunk, session).measured(rounds))


def run(session: Session) -> bool:
    """Write eval.json; return whether our evaluation and a plain one were measured and agree."""
    torch._dynamo.config.recompile_limit = 64
    load_tuned()
    tag_compile_cache()
    if session.way:
        return run_way(session)
    file = PartFile(session, "eval")
    chunk = make_chunk(run_config(session), session.device)
    measured: dict[str, dict[str, Any]] = {}

    def note(name: str, values: dict[str, Any]) -> None:
        measured[name] = values
        losses = {each: found["loss"] for each, found in measured.items()}
        file.write(E1=rows(measured, chunk), loss_of_first_round=losses)

    chosen = {one.name: one.compile for one in CONTENDERS if one.dry or not session.dry}
    file.write(failed=each_alone(chosen, session, session.deadline(0.8), note))
    cut = attempt(lambda: cut_or_whole(chunk, session))
    file.write(E2=cut)
    first = [found["loss"] for found in measured.values()]
    together = bool(first) and max(first) - min(first) < 2e-3
    sides = {name.split(",")[0] for name in measured}
    ok = sides == {"ours", "plain"} and together and not isinstance(cut, str)
    file.finish(ok)
    return ok
