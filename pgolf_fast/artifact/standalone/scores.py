"""Score an artifact: its size against 16,000,000 bytes, then bits per byte in three settings.

`pgolf submit` writes this script next to an artifact; it is the code that counts. It needs torch, numpy and
sentencepiece. Formulas, windows and rounding, including that of gradients, are those of `pgolf eval` without
Triton kernels, so the scores agree.
"""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from pgolf_fast.artifact.standalone.lora import Learner
from pgolf_fast.artifact.standalone.model import Model
from pgolf_fast.artifact.standalone.reader import read_artifact

LIMIT = 16_000_000


class Scorer:
    """Sums nats, targets and bytes over windows, and trains on what has been scored."""

    def __init__(self, model: Model, config: SimpleNamespace, tokens: np.ndarray, target_bytes: np.ndarray):
        self.model, self.config, self.target_bytes = model, config.run, target_bytes
        self.tokens = torch.from_numpy(tokens).to(model.space.device)
        self.length = self.config.eval.seq_len or self.config.train.seq_len

    def windows(self, stride: int, repeat_tail: bool = False) -> np.ndarray:
        """Return (3, windows): begin and end of the inputs, and the first target that counts."""
        count = len(self.target_bytes)
        start = np.arange(0, count, stride)
        end = np.minimum(start + self.length, count)
        if repeat_tail:
            keep = (end - start >= stride) | (start == 0)
            start, end = start[keep], end[keep]
            return np.stack((start, end, np.where(start == 0, 0, np.maximum(end - stride, start))))
        last = int(np.searchsorted(end, count)) + 1
        return np.stack((start[:last], end[:last], np.concatenate(([0], end[: last - 1]))))

    def score(self, windows: np.ndarray, on_grid: bool = False, changes: list | None = None) -> np.ndarray:
        """Return nats, targets and bytes; window i uses the low-rank `changes` of document windows[3, i]."""
        total, batch = np.zeros(3), self.config.eval.batch_seqs or 16
        with torch.no_grad():
            banks = self.model.banks(on_grid)
            for at in range(0, windows.shape[1], batch):
                part = torch.from_numpy(windows[:, at : at + batch]).to(self.tokens.device)
                start, end, first = part[:3, :, None]
                index = start + torch.arange(self.length, device=start.device)
                inside = index < end
                place = torch.where(inside, index, 0)
                x, y = (torch.where(inside, self.tokens[place + i], 0) for i in (0, 1))
                scored = inside & (index >= first)
                own = changes and [t[part[3]] for t in changes]
                losses = self.model.losses(x, y, banks, changes=own)[scored].double().cpu().numpy()
                counted = self.target_bytes[index[scored].cpu().numpy()]
                total += losses.sum(), len(losses), counted.sum()
        return total

    def score_and_learn(self, windows: np.ndarray) -> np.ndarray:
        """Run legal test-time training: score each chunk before training on it; never train on the last."""
        c, model, count = self.config.ttt, self.model, len(self.target_bytes)
        if c.adapter == "lora":
            return self.score_documents(windows)
        if c.adapter not in ("sgd", "adamw"):
            sys.exit(f"this script has no adapter {c.adapter}: pack the run with sgd, adamw or lora")
        chunks = math.ceil(count / c.chunk_tokens)
        chunk_of = np.minimum(windows[2] // c.chunk_tokens, chunks - 1)
        frozen = tuple(f"blocks.{i}." for i in range(c.freeze_blocks))
        names = {"all": ("",), "blocks": ("blocks.", "skip_weights")}.get(c.parameters, ())
        some = {n: p for n, p in model.state.items() if n.startswith(names) and not n.startswith(frozen)}
        learned = [*model.masters, *some.values()]
        for p in learned:
            p.requires_grad_()
            p.grad = torch.zeros_like(p)  # backward adds to it
        if c.parameters in ("blocks", "mlps"):
            banks = model.masters[2 * (c.parameters == "mlps") :]
            slots = [slot for p in banks for slot in self.moving_slots(p)]
            learned = slots + learned[4:]
        rule: torch.optim.Optimizer
        if c.adapter == "sgd":
            rule = torch.optim.SGD(learned, momentum=c.momentum, fused=True)
        else:
            betas = c.momentum, c.beta2
            rule = torch.optim.AdamW(learned, betas=betas, weight_decay=c.weight_decay, fused=True)
        on_grid, fake = c.quantize_forward == "banks", c.quantize_forward == "projections"
        total = np.zeros(3)
        for chunk in range(chunks):
            total += self.score(windows[:, chunk_of == chunk], on_grid)
            if chunk == chunks - 1:
                break
            begin = chunk * c.chunk_tokens
            sequences = min(c.chunk_tokens, count - begin) // self.length
            lr = c.lr
            if c.decay == "cosine":
                lr *= 0.5 * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))
            rule.param_groups[0]["lr"] = torch.tensor(lr)
            for first in [*range(0, sequences, c.batch_seqs)] * c.epochs:
                at = begin + first * self.length
                end = at + min(c.batch_seqs, sequences - first) * self.length
                x, y = (self.tokens[at + i : end + i].view(-1, self.length) for i in (0, 1))
                model.losses(x, y, model.banks(on_grid), fake).mean().backward()
                gradients = [p.grad for p in learned if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
                torch._foreach_div_(gradients, ((norm + 1e-6) / (c.grad_clip or math.inf)).clamp(min=1))
                rule.step()
                rule.zero_grad(False)
        return total

    def moving_slots(self, bank: Tensor) -> list[Tensor]:
        """Return views of a bank, with gradients, that leave out the frozen first blocks."""
        layers, frozen = self.config.model.num_layers, self.config.ttt.freeze_blocks
        spans = [slice(at + frozen, at + layers) for at in range(0, len(bank), layers)]
        parts = [bank.detach()[span] for span in spans]
        for part, span in zip(parts, spans, strict=True):
            part.grad = bank.grad[span] if bank.grad is not None else None
        return parts

    def score_documents(self, windows: np.ndarray) -> np.ndarray:
        """Run it with separate changes per document: many documents in parallel, segment by segment."""
        c, count = self.config.ttt.lora, len(self.target_bytes)
        on_grid = self.config.ttt.quantize_forward == "banks"
        bos = np.flatnonzero(self.tokens[:-1].cpu().numpy() == 1)
        starts = np.union1d([0], bos)
        ends = np.append(starts[1:], count)
        first = np.union1d(windows[2], starts)  # windows are cut where documents start
        inputs = windows[0, np.searchsorted(windows[2], first, side="right") - 1]
        cut = np.stack((inputs, np.append(first[1:], count), first))
        segments = -(-(ends - starts) // c.segment_tokens)
        order, total = np.argsort(-segments, kind="stable"), np.zeros(3)
        for at in range(0, len(order), c.documents):
            batch = order[at : at + c.documents]
            learner = Learner(self.model, self.config, len(batch))
            for number in range(segments[batch[0]]):
                begin = starts[batch] + number * c.segment_tokens
                end = np.maximum(begin, np.minimum(begin + c.segment_tokens, ends[batch]))
                low, high = (np.searchsorted(first, edge) for edge in (begin, end))
                windows_of = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
                row = np.repeat(np.arange(len(low)), high - low)
                total += self.score(np.vstack((cut[:, windows_of], row)), on_grid, learner.tensors)
                if more := int((segments[batch] > number + 1).sum()):
                    learner.learn(self.tokens[begin[:more, None] + np.arange(c.segment_tokens + 1)])
        return total


# The data


def byte_table(tokenizer: SentencePieceProcessor) -> np.ndarray:
    """Return (3, vocabulary): bytes without the leading space, has a leading space, has no text."""
    table = np.zeros((3, len(tokenizer)), np.int64)
    for i in range(len(tokenizer)):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            table[2, i] = 1
        elif tokenizer.is_byte(i):
            table[0, i] = 1
        elif (piece := tokenizer.id_to_piece(i)) not in "\ue001\ue002\ue003\ue004":  # CaseOps: no text
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            table[0, i], table[1, i] = len(text.encode()), piece.startswith("\u2581")
    return table


def read_shards(folder: str, kind: str) -> np.ndarray:
    """Read all shards NAME_kind_NUMBER.bin, in name order."""
    parts = [np.zeros(0, np.uint16)]
    for path in sorted(Path(folder).glob("[!.]*.bin")):
        if re.fullmatch(rf".+_{kind}_\d+\.bin", path.name):
            header, tokens = np.fromfile(path, "<i4", 3), np.fromfile(path, "<u2", offset=1024)
            if list(header) != [20240520, 1, len(tokens)]:
                sys.exit(f"{path} is not a complete shard of tokens")
            parts.append(tokens)
    return np.concatenate(parts).astype(np.int64)


def validation_tokens(folder: str, length: int, limit: int | None) -> np.ndarray:
    """Return a whole number of sequences plus one token, with byte counts from side files, (2, tokens)."""
    tokens, side = read_shards(folder, "val"), read_shards(folder, "val_bytes")
    if len(side) not in (0, len(tokens)):
        sys.exit(f"{folder} has {len(tokens)} validation tokens, but side files for {len(side)}")
    side = side if len(side) else np.full(len(tokens), -1)
    count = len(tokens) if limit is None else min(len(tokens), limit + 1)
    if count <= length:
        needed = f"a sequence of {length} needs one more than that"
        sys.exit(f"{folder} has {len(tokens)} validation tokens; {needed}")
    return np.stack((tokens, side))[:, : (count - 1) // length * length + 1]


def multiplies_bfloat16(device: str) -> bool:
    """Return whether the hardware multiplies in bfloat16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes and bits per byte of an artifact")
    here = Path(__file__)
    parser.add_argument("--artifact", type=Path, default=here.with_name("model.pgolf"))
    parser.add_argument("--data", default=os.environ.get("DATA_PATH", "data/datasets/fineweb10B_sp1024"))
    default = os.environ.get("TOKENIZER_PATH", "data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--tokenizer", default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations; default: the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    if not options.artifact.is_file():
        sys.exit(f"artifact {options.artifact} does not exist")
    code, weights = here.stat().st_size, options.artifact.stat().st_size
    print(f"code {code:,} + artifact {weights:,} = {code + weights:,} bytes of {LIMIT:,}")
    if code + weights > LIMIT:
        sys.exit(f"too large by {code + weights - LIMIT:,} bytes")
    config, arrays = read_artifact(options.artifact.read_bytes())
    if not Path(options.tokenizer).is_file():
        sys.exit(f"tokenizer {options.tokenizer} does not exist")
    run, tokenizer = config.run, SentencePieceProcessor()
    tokenizer.load(options.tokenizer)
    table = byte_table(tokenizer)
    if len(tokenizer) != run.model.vocab_size:
        sys.exit(f"{options.tokenizer} has {len(tokenizer)} pieces, the model {run.model.vocab_size}")
    tokens, side = validation_tokens(options.data, run.eval.seq_len or run.train.seq_len, run.data.val_tokens)
    by_piece = table[0, tokens[1:]] + (table[1, tokens[1:]] & ~table[2, tokens[:-1]])
    target_bytes = np.where(side[1:] < 0, by_piece, side[1:])
    dtype = options.dtype or run.train.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(options.device) else "float32"
    space = torch.from_numpy(table[1] > 0).to(options.device)
    model = Model(config, arrays, space, getattr(torch, dtype))
    scorer = Scorer(model, config, tokens, target_bytes)
    sliding = scorer.windows(run.eval.stride, run.eval.repeat_tail)
    scores = {
        "non_overlapping": lambda: scorer.score(scorer.windows(scorer.length)),
        "sliding": lambda: scorer.score(sliding),
        "sliding_ttt": lambda: scorer.score_and_learn(sliding),
    }
    for name, score in scores.items():
        begin = time.perf_counter()
        nats, count, size = score()
        seconds = time.perf_counter() - begin
        bpb = nats / (math.log(2) * size)
        print(f"{name} val_loss:{nats / count:.8f} val_bpb:{bpb:.8f} seconds:{seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()
