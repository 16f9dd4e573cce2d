"""Sections of a run's report; each has a plain sentence where the run has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_fast import __version__, console
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import SCORES, RunFolder
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.figures import tables
from pgolf_fast.evaluation.scores import conditions, labeled, score_table
from pgolf_fast.io import write_text
from pgolf_fast.lab.audit.check import findings_table
from pgolf_fast.lab.compare.sweep import sweep_table
from pgolf_fast.lab.report import html_page, treemap
from pgolf_fast.lab.report.html_page import Figure, Section
from pgolf_fast.lab.report.loss_curve import as_float, paint_training
from pgolf_fast.lab.report.pace import pace_table, paint_pace
from pgolf_fast.lab.report.run import RunRecord, read_run
from pgolf_fast.lab.report.score_plot import paint_course, paint_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

WIDTH = 9.0  # inches
LONGEST_LIST = 12


def write_report(folder: RunFolder, out: Path) -> Path:
    """Write the HTML report of a run folder in any state and return its path.

    The page says what is missing (an interrupted, unpacked or unscored run, losses that are not finite).
    Raises PgolfError if `folder` has no readable config.json.
    """
    run = read_run(folder)
    makers = (
        *(overview, missing, configuration, training, throughput, scores, quantization_gap, adaptation),
        *(parts, artifact_bytes, audit, environment),
    )
    sections = [make(run) for make in makers]
    page = html_page.render("run", f"Run {run.name}", sections, config=run.config, version=__version__)
    write_text(out, page)
    return out


def overview(run: RunRecord) -> Section:
    """Summarize the run in one table."""
    m = run.config.model
    rows = {
        "preset": run.config.name,
        "state": run.state(),
        "network": f"{m.num_layers} layers x {m.model_dim}, {m.num_parameters():,} parameters",
    }
    if run.steps:
        rows["trained on"] = f"{run.tokens:,} tokens in {console.duration(run.seconds)}"
    for weights, tree in run.scores.items():
        if scored := [key for key in SCORES if _is_scored(tree, key)]:
            bpb, name = tree[scored[-1]]["bpb"], _score_name(tree, scored[-1])
            rows[f"score, {weights} weights"] = f"{bpb:.6f} bits per byte ({name})"
    if run.artifact is not None:
        rows["artifact"] = f"{run.artifact.total_bytes:,} bytes"
    if run.audit:
        rows["audit"] = _verdict(run.audit)
    if hardware := run.environment.get("gpu") or run.environment.get("processor"):
        rows["trained with"] = str(hardware)
    broken = len(run.broken_steps)
    text = f"The loss of {broken:,} steps is not finite: see Training." if broken else ""
    return Section("Overview", text, (Table(("property", "value"), rows.items()),))


def missing(run: RunRecord) -> Section:
    """List the parts that are not available, with the command that creates each."""
    if not run.missing:
        return Section("What is missing", "Nothing: the run is trained, packed, scored and audited.")
    rows = [
        (m.what, m.why, f"`{m.command}`" if m.command.startswith("pgolf") else m.command) for m in run.missing
    ]
    text = f"Run the commands in the folder that contains `{run.name}`."
    return Section("What is missing", text, (Table(("part", "reason", "created by"), rows),))


def configuration(run: RunRecord) -> Section:
    """List the fields that differ from the preset, and what changed when the run resumed."""
    changes = [(row["step"], text) for row in run.resumes for text in row.get("changed") or ["nothing"]]
    resumed = (Table(("resumed at step", "changed"), changes, "Interruptions"),) if changes else ()
    now = dict(flatten(run.config))
    try:
        before = dict(flatten(preset(run.config.name)))
    except PgolfError:
        fields = [(name, _setting(name, value)) for name, value in now.items()]
        text = f"`{run.config.name}` is not the name of a preset; these are all fields."
        return Section("Configuration", text, (Table(("field", "run"), fields), *resumed))
    disabled = tuple(f"{name}." for name in {*now, *before} if now.get(name, ...) is None)
    rows = [
        (name, _setting(name, before.get(name, "on")), _setting(name, now.get(name, "on")))
        for name in dict.fromkeys([*now, *before])
        if now.get(name, ...) != before.get(name, ...) and name != "name" and not name.startswith(disabled)
    ]
    if not rows:
        return Section("Configuration", f"Preset `{run.config.name}`, unchanged.", tables=resumed)
    text = (
        f"Differences from the current preset `{run.config.name}`. Where a preset leaves a choice to the "
        "machine (`auto`, `none`), training records what it chose."
    )
    differences = Table(("field", "preset", "run"), rows, f"{len(rows)} fields that differ")
    return Section("Configuration", text, (differences, *resumed))


def _setting(name: str, value: object) -> str:
    """Format a value as the command line takes it, with only the last component of a path."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "nothing"
    return Path(str(value)).name if name in ("data.path", "data.tokenizer") else str(value)


def training(run: RunRecord) -> Section:
    """Show the loss, the learning rate, validations and learned rates."""
    if not run.steps:
        return Section("Training", "No steps are recorded.", tables=_validations(run))
    losses = {s: loss for s in sorted(run.steps) if math.isfinite(loss := as_float(run.steps[s].get("loss")))}
    batch = run.config.train.batch_tokens
    text = f"Loss of batches of {batch:,} tokens, before the step that learns from them."
    if weight := run.config.train.z_loss:
        text += f" It includes z-loss, {weight:g} times the squared log-sum-exp of the logits."
    if losses:
        first, last = min(losses), max(losses)
        text += (
            f" Step {first:,} had {losses[first]:.4f} nats per token, step {last:,} had {losses[last]:.4f}."
        )
    if broken := run.broken_steps:
        more = len(broken) - LONGEST_LIST
        listed = ", ".join(f"{s:,}" for s in broken[:LONGEST_LIST])
        text += (
            f"\n\nThe loss is not finite at {len(broken):,} of {len(run.steps):,} steps: {listed}"
            f"{f' and {more:,} more' if more > 0 else ''}."
        )
    note, figures = _plot(
        lambda canvas: paint_training(canvas, run.steps, run.validations),
        (WIDTH, 4.8),
        "Training loss and validation by step; below, the learning-rate multiplier.",
        "Loss by step, and below it the factor on all learning rates.",
    )
    return Section("Training", text + note, (*_validations(run), *_slot_rates(run)), figures)


def _validations(run: RunRecord) -> tuple[Table, ...]:
    rows = [
        (
            *(row["step"], row.get("weights", "")),
            *(number(row.get(unit), ".4f") for unit in ("loss", "bpb")),
        )
        for row in run.validations
    ]
    header = ("step", "weights", "nats/token", "bpb")
    return (Table(header, rows, "Validation, non-overlapping windows"),) if rows else ()


def _slot_rates(run: RunRecord) -> tuple[Table, ...]:
    """Tabulate the last recorded MetaSGD factors on the inner learning rate, which start at 1."""
    if not run.slot_rates:
        return ()
    last = run.slot_rates[-1]
    rows = [
        (bank, len(rates), *(f"{v:.4f}" for v in (min(rates), sum(rates) / len(rates), max(rates))))
        for bank, rates in last.items()
        if isinstance(rates, list) and rates
    ]
    header = ("bank", "slots", "min", "mean", "max")
    return (Table(header, rows, f"Learned rates of the inner step (MetaSGD) at step {last['step']:,}"),)


def throughput(run: RunRecord) -> Section:
    """Show tokens per second, and the time of each kind of step."""
    table = pace_table(run.steps)
    if not table.rows:
        return Section("Throughput", "No two successive steps are recorded with their times.")
    text = (
        "Time of a step by the training clock, which excludes validation and checkpoints; "
        f"{console.duration(run.seconds)} in total."
    )
    note, figures = _plot(
        lambda canvas: paint_pace(canvas, run.steps),
        (WIDTH, 3.0),
        "Tokens per second over the run.",
        "Tokens per second: medians over adjacent steps.",
    )
    return Section("Throughput", text + note, (table,), figures)


def scores(run: RunRecord) -> Section:
    """Show the three scores of each kind of weights, and the gains of sliding and of adapting."""
    if not run.scores:
        return Section("Scores", "The run is not scored: run `pgolf eval`.")
    score_tables = []
    for weights, tree in run.scores.items():
        table = score_table(tree)
        table.caption = "The artifact" if weights == "artifact" else "The float weights, before quantization"
        score_tables += [table, _gains(tree)]
    text = (
        "The three scores of the same weights belong together: the gain of test-time training is the third "
        "less the second, and the gain of sliding windows is the second less the first."
    )
    return Section("Scores", text, tuple(table for table in score_tables if table.rows))


def _gains(tree: dict[str, Any]) -> Table:
    steps = {"sliding windows": ("non_overlapping", "sliding"), "TTT": ("sliding", "sliding_ttt")}
    rows = [
        (
            labeled(what, what == "TTT" and tree.get("illegal")),
            *(f"{tree[new][unit] - tree[old][unit]:+.6f}" for unit in ("bpb", "loss")),
        )
        for what, (old, new) in steps.items()
        if _is_scored(tree, old) and _is_scored(tree, new)
    ]
    return Table(("change by", "bpb", "nats/token"), rows)


def _score_name(tree: dict[str, Any], key: str) -> str:
    """Name a score, with a label if it breaks the rules."""
    return labeled(SCORES[key], key == "sliding_ttt" and tree.get("illegal"))


def _is_scored(tree: dict[str, Any], key: str) -> bool:
    score = tree.get(key)
    return isinstance(score, dict) and all(
        math.isfinite(as_float(score.get(unit))) for unit in ("bpb", "loss")
    )


def quantization_gap(run: RunRecord) -> Section:
    """Subtract the float scores from the artifact's, or else the validation at the end of training."""
    title = "Quantization gap"
    artifact, floats = run.scores.get("artifact", {}), run.scores.get("float", {})
    if not artifact:
        return Section(title, "Unknown: the artifact is not scored.")
    both = [key for key in SCORES if _is_scored(artifact, key) and _is_scored(floats, key)]
    differing = [key for key in both if conditions(artifact, key) != conditions(floats, key)]
    pairs = {_score_name(artifact, key): (floats[key], artifact[key]) for key in both if key not in differing}
    text = "Loss of the artifact relative to the float weights on the same targets; positive is worse."
    if differing:
        names = "; ".join(_score_name(artifact, key) for key in differing)
        text += (
            " Not comparable, because float weights and artifact were scored on different targets or with "
            f"other settings: {names}."
        )
    elif not pairs and (ended := run.final_validation) and _is_scored(artifact, "non_overlapping"):
        pairs = {SCORES["non_overlapping"]: (ended, artifact["non_overlapping"])}
        text += (
            " The float weights are not scored; their score here is the validation at the end of training "
            f"({ended['weights']}), over the same windows unless `pgolf eval` was given others."
        )
    rows = []
    for what, (floating, packed) in pairs.items():
        gaps = (packed[unit] - as_float(floating[unit]) for unit in ("bpb", "loss"))
        bpbs = (as_float(floating["bpb"]), packed["bpb"])
        rows.append((what, *(f"{bpb:.6f}" for bpb in bpbs), *(f"{gap:+.6f}" for gap in gaps)))
    if not rows and not differing:
        return Section(title, "Unknown: the float weights are not scored.")
    header = ("windows", "float bpb", "artifact bpb", "gap, bpb", "gap, nats/token")
    return Section(title, text, (Table(header, rows),) if rows else ())


def adaptation(run: RunRecord) -> Section:
    """Show the running score by chunk of test-time training, and the sweep if there is one."""
    title, tree = "Test-time training", run.scores.get("artifact") or run.scores.get("float", {})
    compared = (sweep_table(run.sweep),) if run.sweep.get("adapters") else ()
    course = tree.get("ttt_bpb_by_chunk") or []
    if not (course and _is_scored(tree, "sliding") and _is_scored(tree, "sliding_ttt")):
        return Section(title, "There is no score with test-time training.", compared)
    updates, trainable = tree.get("ttt_updates", 0), tree.get("ttt_trainable_parameters", 0)
    gain = tree["sliding"]["bpb"] - tree["sliding_ttt"]["bpb"]
    order = f"{len(course):,} chunks, each scored before anything learned from it"
    if illegal := tree.get("illegal"):
        order = f"This BREAKS THE RULES of the challenge: {illegal}"
    text = (
        f"{order}; {updates:,} updates of {trainable:,} parameters. The gain is {gain:+.6f} bits per byte "
        "over the same windows without it."
    )
    if settings := _ttt_settings(tree.get("ttt", {})):
        text += f" Settings: {settings}."
    note, figures = _plot(
        lambda canvas: paint_course(canvas.subplots(), tree),
        (WIDTH, 3.4),
        "Running bits per byte by chunk of test-time training, and the sliding score without it.",
        "Bits per byte up to each chunk, in the order of scoring. The dotted line is the whole stream "
        "without test-time training: only the right end compares with it.",
    )
    return Section(title, text + note, compared, figures)


def _ttt_settings(ttt: dict[str, Any]) -> str:
    """List the settings that the adapter uses."""
    names: tuple[str, ...] = ("chunk_tokens", "epochs", "lr", "parameters")
    own = {"lora": "lora", "phased": "lora", "error_guided": "guided"}.get(str(ttt.get("adapter")))
    if own is not None:
        ttt, names = {"adapter": ttt["adapter"], **ttt[own]}, tuple(ttt[own])
    return ", ".join(f"`{name} {ttt[name]}`" for name in ("adapter", *names) if name in ttt)


def parts(run: RunRecord) -> Section:
    """Show the scores by class, context, document and size of the loss."""
    title, weights = "Where the bits go", "artifact" if "artifact" in run.scores else "float"
    tree = run.scores.get(weights, {})
    if "figures" not in tree:
        why = "has none" if tree else "does not exist"
        return Section(title, f"No figures: scores_{weights}.json {why}; `pgolf eval` writes them.")
    note, figures = _plot(
        lambda canvas: paint_parts(canvas.subplots(1, 3), tree),
        (10.5, 3.6),
        "Shares by class of target; bits per byte by tokens of context and by length of document.",
    )
    text = f"Parts of the scores of the {weights} weights." + note
    return Section(title, text, tuple(tables(tree["figures"], illegal=tree.get("illegal"))), figures)


def artifact_bytes(run: RunRecord) -> Section:
    """Show the bytes of the artifact by section, and what remains of the limit."""
    table, pack = run.artifact, run.config.pack
    if table is None:
        return Section("Bytes", "There is no artifact.")
    code = code_bytes() if pack.code_bytes is None else pack.code_bytes
    total = table.total_bytes + code
    left = pack.limit_bytes - total
    fits = f"{left:,} bytes are left" if left >= 0 else f"that is {-left:,} bytes too many"
    text = (
        f"Artifact {table.total_bytes:,} + code {code:,} = {total:,} bytes of {pack.limit_bytes:,}: {fits}."
    )
    note, figures = _plot(
        lambda canvas: treemap.paint_treemap(canvas, table),
        treemap.SIZE,
        "Treemap of the artifact: one rectangle per tensor, with an area in proportion to its bytes.",
        "Tensors of the artifact; areas are in proportion to the stored bytes.",
    )
    return Section("Bytes", text + note, (table.section_table(),), figures)


def audit(run: RunRecord) -> Section:
    """Show the findings of `pgolf audit`."""
    findings = run.audit.get("findings")
    if not findings:
        return Section("Audit", "The run is not audited: `pgolf audit` checks it against the rules.")
    text = f"{_verdict(run.audit)}, on {run.audit.get('tokens', 0):,} targets."
    return Section("Audit", text, (findings_table(findings),))


def _verdict(tree: dict[str, Any]) -> str:
    findings = tree.get("findings") or []
    failed = [f["id"] for f in findings if f["passed"] is False]
    held, skipped = (sum(f["passed"] is answer for f in findings) for answer in (True, None))
    text = f"{held} of {len(findings)} properties hold"
    if skipped:
        text += f", {skipped} could not be checked"
    return f"FAILED: {', '.join(failed)} ({text})" if failed else text


def environment(run: RunRecord) -> Section:
    """List the machine and the versions that training recorded."""
    if not run.environment:
        return Section("Environment", "There is no env.json: machine and versions are unknown.")
    rows = [
        (name.replace("_", " "), "none" if value is None else value)
        for name, value in run.environment.items()
    ]
    return Section("Environment", "As recorded by training.", (Table(("property", "value"), rows),))


def _plot(
    paint: Callable[[Canvas], None], size: tuple[float, float], alt: str, caption: str = ""
) -> tuple[str, tuple[Figure, ...]]:
    """Draw one figure; if it cannot be drawn, return a paragraph that says why instead."""
    try:
        return "", (html_page.figure(paint, size, alt=alt, caption=caption),)
    except PgolfError as error:
        return f"\n\nNo plot: {error}.", ()
