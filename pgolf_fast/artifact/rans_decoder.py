"""Reference decoder of the rANS payloads of csrc/rans.h, for submissions: Python and numpy only.

`decode(payload, shapes)` returns the bytes of the arrays of `shapes`, each (rows, columns, itemsize), one
after another. Raises ValueError or IndexError for a damaged payload. docs/rans.md describes every byte.
Method: J. Duda, "Asymmetric numeral systems", 2013; F. Giesen, "Interleaved entropy coders", 2014.
"""

from io import BytesIO
from math import isqrt

import numpy as np

WEIGHTS = np.array([isqrt(isqrt(isqrt(isqrt(1 << 496 - i)))) for i in range(256)])  # 2^(31 - i/16), floored


def numbers(header):  # Elias gamma codes: as many zeros as n + 1 has bits after its first, then n + 1
    bits, end = "".join(f"{byte:08b}" for byte in header), 0
    while True:
        start, end = end, 2 * bits.index("1", end) - end + 1
        yield int(bits[start:end], 2) - 1


def read_model(number):  # by slot 0..2^14-1: the byte, its frequency, its first slot
    weights, symbol, level = np.zeros(256, np.int64), 0, 0
    for _ in range(number() + 1):
        symbol += number()
        changes = np.array([number() for _ in range(number() + 1)])
        levels = level + np.cumsum(np.cumsum(changes >> 1 ^ -(changes & 1)))
        weights[symbol : symbol + len(levels)] = WEIGHTS[levels.astype(np.uint32)]  # rejects levels below 0
        symbol, level = symbol + len(levels), levels[-1]
    counts = np.where(weights > 0, np.maximum(1, (weights << 14) // weights.sum()), 0)
    counts[counts.argmax()] += 2**14 - counts.sum()
    return np.repeat([np.arange(256) ^ 128, counts, np.cumsum(counts) - counts], counts, axis=1)


def decode_segment(number, body, slots, models):
    states = np.frombuffer(body.read(4 * number() + 4), "<u4").astype(np.int64)  # one per lane
    words = np.frombuffer(body.read(2 * number()), "<u2")
    symbols, first_slots = np.empty(len(models), np.uint8), models.astype(np.uint32).astype(np.int64) << 14
    for i in range(0, len(models), len(states)):
        x = states[: len(models) - i]
        slot = x & 16383
        symbols[i : i + len(x)], frequency, start = slots[:, first_slots[i : i + len(x)] + slot]
        x[:] = frequency * (x >> 14) + slot - start
        low = np.flatnonzero(x < 65536)
        x[low], words = x[low] << 16 | words[: len(low)], words[len(low) :]
    if len(words) or (states != 65536).any():
        raise ValueError("the rANS payload is corrupt: a segment does not end as it must")
    return symbols


def decode(payload, shapes):
    if payload[:1] in (b"", b"\0"):
        return payload[1:]
    body, shapes = BytesIO(payload[5:]), [shape for shape in shapes if shape[0] * shape[1]]
    number = numbers(body.read(int.from_bytes(payload[1:5], "little"))).__next__
    palettes = {k: np.cumsum([number() for _ in range(number())], dtype=f"<u{k}") for k in (2, 4)}
    tables = [t for _ in range(min(number(), 257)) for t in [read_model(number)] * min(number() + 1, 257)]
    slots, arrays, matrices, vectors = np.concatenate(tables[:256], axis=1), [], [], []
    for rows, columns, itemsize in shapes:
        palette = palettes.get(itemsize, ())
        arrays.append((palette, 1 if len(palette) else itemsize))
        for _ in range(arrays[-1][1]):
            matrices.append(number())
            vectors += [(n, number()) for n in ((rows, columns) if itemsize == 1 else (1, rows * columns))]
    lengths = [n if model else 0 for n, model in vectors]
    models = np.repeat([max(model - 1, 0) for _, model in vectors], lengths)
    classes = iter(np.split(decode_segment(number, body, slots, models).view(np.int8), np.cumsum(lengths)))
    classes = [np.resize(next(classes), n).astype(np.int16) for n, _ in vectors]  # an empty one becomes zeros
    models = [m + np.add.outer(classes[2 * i], classes[2 * i + 1]).ravel() for i, m in enumerate(matrices)]
    ends, models, each = np.cumsum([len(some) for some in models]), np.concatenate(models), number()
    parts = [decode_segment(number, body, slots, models[i : i + each]) for i in range(0, len(models), each)]
    if payload[0] != 1 or len(tables) > 256 or body.read(1):
        raise ValueError("the rANS payload is corrupt: its kind, too many models, or bytes left over")
    planes = iter(np.split(np.concatenate(parts), ends))
    items = [(palette, np.stack([next(planes) for _ in range(count)], axis=1)) for palette, count in arrays]
    return b"".join((palette[some] if len(palette) else some).tobytes() for palette, some in items)
