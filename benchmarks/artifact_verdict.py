"""The tables of `bench_artifact.py`, and its results beside the limits they were meant to keep."""

from __future__ import annotations

from typing import Any

from artifact_codecs import BASELINE, PEERS

from pgolf_fast import console

Found = dict[str, Any]
CONTAINER = "container"
OVER_BOUND = 0.5  # percent
OF_BASELINE = {"equal": 0.945, "spread": 0.92}  # bytes of the codes
FASTER_ENCODE, FASTER_DECODE = 100.0, 3.0
PLAIN_READER, PLAIN_READER_SECONDS = "container, read in Python", 20.0
SECONDS = {"gptq": 20.0, "pack": 3.0, "load": 2.0, "prune": 10.0}
BYTES_BELOW = 200
PEAK_MIB = 4096.0


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def report_text(content: Found) -> str:
    """All tables of a run. The limits are meant for full size, so a smoke test is not held to them."""
    parts = []
    for name, found in content["artifacts"].items():
        parts += [heading(name, found), bound_table(found), contender_table(found)]
    if content["pipeline"]:
        rows = [
            (step, *(shown(found.get(k, "-")) for k in _STEP)) for step, found in content["pipeline"].items()
        ]
        parts.append(console.table(rows, ("step", *_STEP)))
        broken = {step: found["error"] for step, found in content["pipeline"].items() if "error" in found}
        parts += [f"{step}: FAILED, {why}" for step, why in broken.items()]
    checks = [] if content["smoke"] else verdicts(content)
    if checks:
        parts.append(console.table(checks, ("what", "measured", "limit", "kept")))
    return "\n\n".join(parts)


_STEP = ("seconds", "peak_mib", "bytes", "target_bytes", "bytes_below")


def heading(name: str, found: Found) -> str:
    bits = 8 * found["bounds"]["order 0"]["bytes"] / max(found["codes"], 1)
    return (
        f"{name}: {found['codes']:,} codes of {found['model']}, order-0 entropy {bits:.3f} bits; "
        f"{found['reference_bytes']:,} bytes as the compressors get it"
    )


def bound_table(found: Found) -> str:
    rows = [
        (
            name,
            shown(round(b["bytes"])),
            shown(8 * b["bytes"] / found["codes"]),
            shown(round(b["side_bytes"])),
        )
        for name, b in found["bounds"].items()
    ]
    return console.table(rows, ("bound of the codes", "bytes", "bits a code", "and to tell the model, about"))


def contender_table(found: Found) -> str:
    """Sizes with their ratio to the baseline; `over bound`: of the codes over the best static bound."""
    rows, notes = [], []
    base = found["contenders"].get(BASELINE, {})
    for name, c in found["contenders"].items():
        if "encode_s" not in c:
            notes.append(
                f"{name}: " + (f"skipped, {c['skipped']}" if "skipped" in c else f"FAILED, {c['error']}")
            )
            continue
        rows.append(
            (
                name,
                shown(c.get("bytes", "-")),
                _ratio(c, base, "bytes"),
                shown(c.get("codes_bytes", "-")),
                _ratio(c, base, "codes_bytes"),
                f"{over_bound(found, c['codes_bytes']):+.2f}%" if "codes_bytes" in c else "-",
                f"{c['encode_s']:.3f}",
                f"{c['decode_s']:.3f}",
                f"{c['memory_mib']:.0f}",
            )
        )
    header = ("contender", "bytes", "ratio", "codes", "ratio", "over bound", "encode s", "decode s", "MiB")
    lines = [console.table(rows, header)] if rows else []
    if packed := found["contenders"].get(CONTAINER, {}).get("sections"):
        notes.append("container: " + ", ".join(f"{s} {c} {n:,}" for s, (c, n) in packed.items()))
    return "\n".join([*lines, *notes])


def _ratio(found: Found, base: Found, key: str) -> str:
    return f"{found[key] / base[key]:.4f}" if key in found and key in base else "-"


def over_bound(found: Found, codes_bytes: int) -> float:
    """Percent by which the codes are larger than the best static bound."""
    return 100 * (codes_bytes / found["bounds"][found["best_bound"]]["bytes"] - 1)


Verdict = tuple[str, str, str, str]


def verdicts(content: Found) -> list[Verdict]:
    """What was measured, the limit, and "yes" or "NO"; only what this run can tell."""
    rows: list[Verdict] = []
    for name, found in content["artifacts"].items():
        rows += _codec_verdicts(name, found)
    for step, found in content["pipeline"].items():
        if "seconds" in found:
            rows.append(_at_most(f"{step}: seconds", found["seconds"], SECONDS[step]))
            rows.append(_at_most(f"{step}: peak MiB", found["peak_mib"], PEAK_MIB))
        if "bytes_below" in found:
            below = found["bytes_below"]
            kept = "yes" if 0 <= below <= BYTES_BELOW else "NO"
            rows.append((f"{step}: bytes below the target", shown(below), f"0 to {BYTES_BELOW}", kept))
    return rows


def _codec_verdicts(name: str, found: Found) -> list[Verdict]:
    measured = {n: c for n, c in found["contenders"].items() if "encode_s" in c}
    ours, base = measured.get(CONTAINER), measured.get(BASELINE)
    peers = {n: c for n, c in measured.items() if n in PEERS}
    if ours is None or base is None:
        return []
    rows = []
    for key, what in {"bytes": "bytes", "codes_bytes": "bytes of the codes"}.items():
        peer = min((n for n in peers if key in peers[n]), key=lambda n: peers[n][key])
        rows.append(_at_most(f"{name}: {what}, best peer {peer}", ours[key], peers[peer][key]))
    over = over_bound(found, ours["codes_bytes"])
    rows.append(_at_most(f"{name}: codes over the bound '{found['best_bound']}', percent", over, OVER_BOUND))
    if PLAIN_READER in measured:
        seconds = measured[PLAIN_READER]["decode_s"]
        rows.append(_at_most(f"{name}: {PLAIN_READER}, seconds", seconds, PLAIN_READER_SECONDS))
    if name in OF_BASELINE:
        ratio = ours["codes_bytes"] / base["codes_bytes"]
        rows.append(_at_most(f"{name}: codes / {BASELINE}", ratio, OF_BASELINE[name]))
        least = found["bounds"]["oracle"]["bytes"] / base["codes_bytes"]
        rows.append((f"{name}: oracle / {BASELINE}: no coder comes below", shown(least), "-", "-"))
        for key, wanted in {"encode_s": FASTER_ENCODE, "decode_s": FASTER_DECODE}.items():
            faster = base[key] / ours[key]
            kept = "yes" if faster >= wanted else "NO"
            rows.append((f"{name}: times as fast, {key[:-2]}", shown(faster), f"at least {wanted:g}", kept))
    return rows


def _at_most(what: str, value: float, limit: float) -> Verdict:
    return what, shown(value), f"at most {shown(limit)}", "yes" if value <= limit else "NO"


def failures(content: Found) -> list[str]:
    """Contenders and steps that broke. A limit that is missed is no failure: it is a result."""
    every = [c for found in content["artifacts"].values() for c in found["contenders"].items()]
    return [name for name, found in [*every, *content["pipeline"].items()] if "error" in found]
