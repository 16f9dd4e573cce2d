"""The sections of a run's page, each with a plain sentence where the run has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast import console
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import preset
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.scores import conditions, mark
from pgolf_fast.lab.report import html_page
from pgolf_fast.lab.report.html_page import Figure, Section, Table
from pgolf_fast.lab.report.loss_curve import number, paint_training
from pgolf_fast.lab.report.pace import pace_rows, paint_pace
from pgolf_fast.lab.report.run import Run
from pgolf_fast.lab.report.score_plot import paint_course, paint_parts
from pgolf_fast.lab.report.treemap import HEIGHT, WIDTH, paint_treemap

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

SCORES = {
    "non_overlapping": "non-overlapping windows",
    "sliding": "sliding windows",
    "sliding_ttt": "sliding windows, test-time training",
}
WIDE = (9.0, 4.2)  # inches
LONGEST_LIST = 12


def sections(run: Run) -> list[Section]:
    """All of them, in the order of a page."""
    makers = (
        glance,
        lacking,
        configuration,
        training,
        throughput,
        scores,
        quantisation_gap,
        adaptation,
        parts,
        artifact_bytes,
        audit,
        environment,
    )
    return [make(run) for make in makers]


def glance(run: Run) -> Section:
    """What a reader wants to know first."""
    m, rows = run.config.model, [("preset", run.config.name), ("state", run.state())]
    network = f"{m.num_layers} layers x {m.model_dim}, {m.num_parameters():,} parameters"
    rows.append(("network", network))
    if run.steps:
        rows.append(("trained on", f"{run.tokens:,} tokens in {console.duration(run.seconds)}"))
    for weights, story in run.scores.items():
        found = [(key, story[key]) for key in SCORES if _scored(story, key)]
        if found:
            key, score = found[-1]
            shown = f"{score['bpb']:.6f} bits per byte ({_title(story, key)})"
            rows.append((f"score, {weights} weights", shown))
    if run.artifact is not None:
        rows.append(("artifact", f"{run.artifact.total_bytes:,} bytes"))
    if run.audit:
        rows.append(("audit", _verdict(run.audit)))
    hardware = run.environment.get("gpu") or run.environment.get("processor")
    if hardware:
        rows.append(("trained with", str(hardware)))
    text = ""
    if run.broken:
        text = f"The loss of {len(run.broken):,} steps is not finite: see Training."
    return Section("At a glance", text, (Table(("what", "value"), tuple(rows)),))


def lacking(run: Run) -> Section:
    """What the page would show if it were there, and what makes it."""
    if not run.missing:
        return Section("What is missing", "Nothing: the run is trained, packed, scored and audited.")
    rows = tuple(
        (m.what, m.why, f"`{m.command}`" if m.command.startswith("pgolf") else m.command) for m in run.missing
    )
    text = f"Commands are for the folder that `{run.name}` lies in."
    return Section("What is missing", text, (Table(("what", "why", "made by"), rows),))


def configuration(run: Run) -> Section:
    """What differs from the preset, and what changed on the way."""
    changes = tuple(
        (str(row["step"]), text) for row in run.resumes for text in row.get("changed") or ["nothing"]
    )
    resumed = Table(("resumed at step", "changed"), changes, "Interruptions")
    tables = (resumed,) if changes else ()
    try:
        before = dict(flatten(preset(run.config.name)))
    except PgolfError:
        every = tuple((name, _setting(name, value)) for name, value in flatten(run.config))
        text = f"`{run.config.name}` is not the name of a preset; these are all settings."
        return Section("Configuration", text, (Table(("field", "run"), every), *tables))
    now = dict(flatten(run.config))
    off = tuple(f"{name}." for name in {*now, *before} if now.get(name, ...) is None)
    rows = tuple(
        (name, _setting(name, before.get(name, "on")), _setting(name, now.get(name, "on")))
        for name in dict.fromkeys([*now, *before])
        if now.get(name, ...) != before.get(name, ...) and name != "name" and not name.startswith(off)
    )
    if not rows:
        return Section("Configuration", f"Preset `{run.config.name}`, with nothing changed.", tables=tables)
    table = Table(("field", "preset", "run"), rows, f"{len(rows)} fields that differ")
    return Section(
        "Configuration",
        f"What differs from preset `{run.config.name}` as it is now; training writes down what it chose "
        "where a preset leaves the choice to the machine (`auto`, `none`).",
        (table, *tables),
    )


def _setting(name: str, value: object) -> str:
    """As `pgolf config` takes it; of paths the last part, as the rest is about a machine."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "nothing"
    return Path(str(value)).name if name in ("data.path", "data.tokenizer") else str(value)


def training(run: Run) -> Section:
    """Loss and learning rate."""
    if not run.steps:
        return Section("Training", "No step is on record.", tables=_validations(run))
    losses = [(s, number(run.steps[s].get("loss"))) for s in sorted(run.steps)]
    finite = [(s, loss) for s, loss in losses if math.isfinite(loss)]
    text = (
        f"Loss of batches of {run.config.train.batch_tokens:,} tokens, before the step that learns from them."
    )
    if weight := run.config.train.z_loss:
        text += f" It holds z-loss, {weight:g} times the squared log-sum-exp of the logits."
    if finite:
        (first, begin), (last, end) = finite[0], finite[-1]
        text += f" Step {first:,} had {begin:.4f} nats per token, step {last:,} had {end:.4f}."
    if run.broken:
        more = len(run.broken) - LONGEST_LIST
        named = ", ".join(f"{s:,}" for s in run.broken[:LONGEST_LIST])
        text += (
            f"\n\nThe loss is not finite at {len(run.broken):,} of {len(losses):,} steps: {named}"
            f"{f' and {more:,} more' if more > 0 else ''}."
        )
    alt = "Training loss and validation by step; below, the learning-rate multiplier."
    note, figures = _pictures(
        lambda: html_page.figure(
            lambda figure: paint_training(figure, run.steps, run.validations),
            (WIDE[0], 4.8),
            alt=alt,
            caption="Loss by step, and the factor on all learning rates below it.",
        )
    )
    return Section("Training", text + note, (*_validations(run), *_slot_rates(run)), figures)


def _validations(run: Run) -> tuple[Table, ...]:
    rows = tuple(
        (
            str(row["step"]),
            str(row.get("weights", "")),
            _shown(row.get("loss"), ".4f"),
            _shown(row.get("bpb"), ".4f"),
        )
        for row in run.validations
    )
    header = ("step", "weights", "nats/token", "bits/byte")
    return (Table(header, rows, "Validation, non-overlapping windows"),) if rows else ()


def _slot_rates(run: Run) -> tuple[Table, ...]:
    """What MetaSGD has learned, as last recorded: factors on the inner learning rate, which start at 1."""
    if not run.slot_rates:
        return ()
    last = run.slot_rates[-1]
    rows = tuple(
        (bank, str(len(rates)), f"{min(rates):.4f}", f"{sum(rates) / len(rates):.4f}", f"{max(rates):.4f}")
        for bank, rates in last.items()
        if isinstance(rates, list) and rates
    )
    header = ("bank", "slots", "least", "mean", "most")
    return (Table(header, rows, f"Learned rates of the inner step (MetaSGD) at step {last['step']:,}"),)


def throughput(run: Run) -> Section:
    """Tokens a second, and the time of each kind of step."""
    rows = pace_rows(run.steps, run.config.train.batch_tokens)
    if not rows:
        return Section("Throughput", "No two steps with their times are on record.")
    text = (
        "Time of a step from the training clock, which leaves out validation and checkpoints; "
        f"{console.duration(run.seconds)} in all."
    )
    header = ("steps", "count", "median ms", "10 %", "90 %", "tokens/s")
    note, figures = _pictures(
        lambda: html_page.figure(
            lambda figure: paint_pace(figure, run.steps, run.config.train.batch_tokens),
            (WIDE[0], 3.0),
            alt="Tokens per second over the run.",
            caption="Tokens per second: medians of neighboring steps.",
        )
    )
    return Section("Throughput", text + note, (Table(header, rows),), figures)


def scores(run: Run) -> Section:
    """The three scores of each kind of weights, and what sliding and adapting gain."""
    if not run.scores:
        return Section("Scores", "The run is not scored: `pgolf eval` does that.")
    tables = []
    for weights, story in run.scores.items():
        rows = [
            (
                _title(story, key),
                f"{story[key]['bpb']:.6f}",
                f"{story[key]['loss']:.6f}",
                f"{story[key]['tokens']:,}",
            )
            for key in SCORES
            if _scored(story, key)
        ]
        what = "The artifact" if weights == "artifact" else "The float weights, before quantisation"
        tables.append(Table(("windows", "bits/byte", "nats/token", "targets"), tuple(rows), what))
        tables.append(_gains(story))
    return Section(
        "Scores",
        "Three scores of the same weights, always together: what test-time training gains is the third less "
        "the second, and what sliding windows gain is the second less the first.",
        tuple(table for table in tables if table.rows),
    )


def _gains(story: dict[str, Any]) -> Table:
    steps = (
        ("sliding windows", "non_overlapping", "sliding"),
        (mark("test-time training", story.get("illegal")), "sliding", "sliding_ttt"),
    )
    rows = tuple(
        (
            what,
            f"{story[new]['bpb'] - story[old]['bpb']:+.6f}",
            f"{story[new]['loss'] - story[old]['loss']:+.6f}",
        )
        for what, old, new in steps
        if _scored(story, old) and _scored(story, new)
    )
    return Table(("change by", "bits/byte", "nats/token"), rows)


def _title(story: dict[str, Any], key: str) -> str:
    """What that score is called, with a word to it if it breaks the rules."""
    return mark(SCORES[key], key == "sliding_ttt" and story.get("illegal"))


def _scored(story: dict[str, Any], key: str) -> bool:
    score = story.get(key)
    return isinstance(score, dict) and all(math.isfinite(number(score.get(unit))) for unit in ("bpb", "loss"))


def quantisation_gap(run: Run) -> Section:
    """Artifact less float weights, score by score; else by the validation of those weights in training."""
    title = "Quantisation gap"
    ours, theirs = run.scores.get("artifact", {}), run.scores.get("float", {})
    if not ours:
        return Section(title, "Not known: the artifact is not scored.")
    header = ("windows", "float", "artifact", "gap, bits/byte", "gap, nats/token")
    both = [key for key in SCORES if _scored(ours, key) and _scored(theirs, key)]
    apart = [key for key in both if conditions(ours, key) != conditions(theirs, key)]
    pairs = [(_title(ours, key), theirs[key], ours[key]) for key in both if key not in apart]
    text = "What the artifact loses against the float weights on the same targets; positive is worse."
    if apart:
        text += (
            " Not comparable, as float weights and artifact were scored on different targets or with other "
            f"settings: {'; '.join(_title(ours, key) for key in apart)}."
        )
    elif not pairs and (ended := run.final_validation) and _scored(ours, "non_overlapping"):
        pairs = [(SCORES["non_overlapping"], ended, ours["non_overlapping"])]
        text += (
            f" The float weights are not scored; their figure is the validation that ended training "
            f"({ended['weights']}), over the same windows unless `pgolf eval` was told to use others."
        )
    rows = tuple(
        (
            what,
            f"{number(float_['bpb']):.6f}",
            f"{packed['bpb']:.6f}",
            f"{packed['bpb'] - number(float_['bpb']):+.6f}",
            f"{packed['loss'] - number(float_['loss']):+.6f}",
        )
        for what, float_, packed in pairs
    )
    if not rows and not apart:
        return Section(title, "Not known: there is no score of the float weights.")
    return Section(title, text, (Table(header, rows),) if rows else ())


def adaptation(run: Run) -> Section:
    """The score as it went on, chunk by chunk, and the sweep if there is one."""
    title, weights = "Test-time training", "artifact" if "artifact" in run.scores else "float"
    tables = _sweep(run)
    story = run.scores.get(weights, {})
    course = story.get("ttt_bpb_by_chunk") or []
    if not (course and _scored(story, "sliding") and _scored(story, "sliding_ttt")):
        return Section(title, "There is no score with test-time training.", tables)
    ttt = story.get("ttt", {})
    told = ("chunk_tokens", "epochs", "lr", "parameters")
    own = {"lora": "lora", "phased": "lora", "error_guided": "guided"}.get(ttt.get("adapter"))
    if own is not None:
        ttt, told = {"adapter": ttt["adapter"], **ttt[own]}, tuple(ttt[own])
    how = ", ".join(f"`{name} {ttt[name]}`" for name in ("adapter", *told) if name in ttt)
    updates, trainable = story.get("ttt_updates", 0), story.get("ttt_trainable_parameters", 0)
    gain = story["sliding"]["bpb"] - story["sliding_ttt"]["bpb"]
    order = f"{len(course):,} chunks, each scored before anything learned from it"
    if illegal := story.get("illegal"):
        order = f"This BREAKS THE RULES of the challenge: {illegal}"
    text = (
        f"{order}; {updates:,} updates of {trainable:,} parameters. It gained {gain:+.6f} bits per byte over "
        "the same windows without it."
    )
    if how:
        text += f" Settings: {how}."
    note, figures = _pictures(
        lambda: html_page.figure(
            lambda figure: paint_course(figure.subplots(), story),
            (WIDE[0], 3.4),
            alt="Bits per byte so far, by chunk of test-time training, and the sliding score without it.",
            caption="Bits per byte up to each chunk, in the order of scoring. The dotted line is of the "
            "whole stream without test-time training: only the right end compares with it.",
        )
    )
    return Section(title, text + note, tables, figures)


def _sweep(run: Run) -> tuple[Table, ...]:
    found, illegal = run.sweep.get("adapters"), run.sweep.get("illegal", {})
    if not found:
        return ()
    rows = tuple(
        (
            mark(name, name in illegal),
            f"{a['bpb']:.6f}",
            f"{a['gain']:+.6f}",
            f"{a['low']:+.5f} to {a['high']:+.5f}",
            f"{a['updates']:,}",
        )
        for name, a in found.items()
    )
    header = ("adapter", "bits/byte", "gain", "95 % interval", "updates")
    return (Table(header, rows, f"Adapters compared on {run.sweep.get('tokens', 0):,} targets"),)


def parts(run: Run) -> Section:
    """The figures of the scores: by class, context, document and size of loss."""
    title, weights = "Where the bits go", "artifact" if "artifact" in run.scores else "float"
    story = run.scores.get(weights, {})
    if "figures" not in story:
        why = "was written before it held any" if story else "is not there"
        return Section(title, f"No figures: scores_{weights}.json {why}; `pgolf eval` writes them.")
    sliding = story["figures"]["sliding"]
    nats = {name: p["tokens"] * (p["loss"] or 0.0) for name, p in sliding["by_class"].items()}
    tokens = sum(p["tokens"] for p in sliding["by_class"].values())
    rows = tuple(
        (
            name,
            f"{p['tokens'] / tokens:.2%}",
            f"{nats[name] / sum(nats.values()):.2%}",
            _shown(p["bpb"], ".4f"),
            _shown(p["loss"], ".4f"),
        )
        for name, p in sliding["by_class"].items()
    )
    above = tuple(
        (f"> {nats} nats", f"{a['targets']:.2%}", f"{a['loss']:.2%}")
        for nats, a in sliding["above_nats"].items()
    )
    header = ("class of target", "of all", "of the loss", "bits/byte", "nats/token")
    tables = (
        Table(header, rows, f"Sliding windows, {weights} weights"),
        Table(("targets", "of all", "of the loss"), above, "By size of loss"),
    )
    note, figures = _pictures(
        lambda: html_page.figure(
            lambda figure: paint_parts(figure.subplots(1, 3), story),
            (10.5, 3.6),
            alt="Shares by class of target; bits per byte by tokens of context and by length of document.",
        )
    )
    return Section(title, note.strip(), tables, figures)


def artifact_bytes(run: Run) -> Section:
    """Where the artifact's bytes are, and what is left of the limit."""
    table, pack = run.artifact, run.config.pack
    if table is None:
        return Section("Bytes", "There is no artifact to weigh.")
    code = code_bytes() if pack.code_bytes is None else pack.code_bytes
    total = table.total_bytes + code
    left = pack.limit_bytes - total
    fits = f"{left:,} bytes are left" if left >= 0 else f"that is {-left:,} bytes too many"
    text = (
        f"Artifact {table.total_bytes:,} + code {code:,} = {total:,} bytes of {pack.limit_bytes:,}: {fits}."
    )
    values = {s.name: sum(t.values for t in table.tensors if t.section == s.name) for s in table.sections}
    rows = tuple(
        (
            s.name,
            s.codec,
            f"{values[s.name]:,}",
            f"{s.raw_bytes:,}",
            f"{s.stored_bytes:,}",
            f"{8 * s.stored_bytes / max(values[s.name], 1):.3f}",
            f"{s.stored_bytes / table.total_bytes:.1%}",
        )
        for s in table.sections
    )
    rows += (
        (
            "header",
            "-",
            "-",
            "-",
            f"{table.header_bytes:,}",
            "-",
            f"{table.header_bytes / table.total_bytes:.1%}",
        ),
    )
    header = ("section", "codec", "values", "raw bytes", "stored bytes", "bits/value", "of the artifact")

    def paint(figure: Picture) -> None:
        figure.set_layout_engine("none")
        paint_treemap(figure, table)

    note, figures = _pictures(
        lambda: html_page.figure(
            paint,
            (WIDTH, HEIGHT),
            alt="Treemap of the artifact: a rectangle for each tensor, as large as its bytes.",
            caption="Every tensor of the artifact; areas are bytes as stored.",
        )
    )
    return Section("Bytes", text + note, (Table(header, rows),), figures)


def audit(run: Run) -> Section:
    """The findings of `pgolf audit`."""
    findings = run.audit.get("findings") or []
    if not findings:
        return Section("Audit", "The run is not audited: `pgolf audit` checks it against the rules.")
    rows = tuple((f["id"], f["title"], f["verdict"], f"{f['seconds']:.1f}", f["evidence"]) for f in findings)
    text = f"{_verdict(run.audit)}, on {run.audit.get('tokens', 0):,} targets."
    return Section("Audit", text, (Table(("number", "property", "verdict", "seconds", "evidence"), rows),))


def _verdict(story: dict[str, Any]) -> str:
    findings = story.get("findings") or []
    wrong = [f["id"] for f in findings if f["passed"] is False]
    held, unasked = (sum(f["passed"] is answer for f in findings) for answer in (True, None))
    text = f"{held} of {len(findings)} properties hold"
    if unasked:
        text += f", {unasked} could not be asked"
    return f"FAILED: {', '.join(wrong)} ({text})" if wrong else text


def environment(run: Run) -> Section:
    """Machine and versions that training recorded."""
    if not run.environment:
        return Section("Environment", "No env.json is there: machine and versions are not known.")
    rows = tuple(
        (name.replace("_", " "), "none" if value is None else str(value))
        for name, value in run.environment.items()
    )
    return Section("Environment", "As training recorded it.", (Table(("what", "value"), rows),))


def _pictures(*makers: Callable[[], Figure]) -> tuple[str, tuple[Figure, ...]]:
    """The figures; where one cannot be drawn, a paragraph that says why, and those that can."""
    notes, figures = list[str](), list[Figure]()
    for make in makers:
        try:
            figures.append(make())
        except PgolfError as error:
            notes.append(f"\n\nNo picture: {error}.")
    return "".join(dict.fromkeys(notes)), tuple(figures)


def _shown(value: object, form: str) -> str:
    found = number(value)
    return format(found, form) if math.isfinite(found) else "-"
