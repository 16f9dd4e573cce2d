"""Report of a run in any state; a section with nothing to show has a plain sentence instead."""

import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgolf_fast import __version__, console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.bench import drawing
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import SCORES, RunFolder, read_scores
from pgolf_fast.console import Table, command, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.figures import tables
from pgolf_fast.evaluation.scores import labeled, score_table
from pgolf_fast.io import load_metadata, read_json, write_text
from pgolf_fast.lab.analysis.artifact_bytes import ArtifactTable, artifact_table
from pgolf_fast.lab.audit.check import findings_table
from pgolf_fast.lab.compare.sweep import sweep_table
from pgolf_fast.lab.report import plots
from pgolf_fast.lab.report.html_page import Figure, Section, portable, render
from pgolf_fast.lab.report.plots import as_float, pace_table

WIDTH = 9.0  # inches
LONGEST_LIST = 12
Tree = dict[str, Any]  # a JSON object
# Titles of sections that are not those of their functions
TITLES = {"missing": "What is missing", "adaptation": "Test-time training"}
TITLES |= {"parts": "Where the bits go", "artifact_bytes": "Bytes"}


def _artifact(path: Path) -> Tree:
    return {"table": artifact_table(path, tried=()), "sha256": sizes(path).sha256}


class RunRecord:
    """Parsed files of a run folder; one that is missing or damaged is empty or None, listed in `missing`."""

    def __init__(self, folder: RunFolder):
        """Read a run folder that has at least config.json. Raises PgolfError if it has none."""
        self.folder, self.config = folder, folder.read_config()
        self.name = name = os.fsencode(folder.path.resolve().name).decode("utf-8", "replace")
        named = RunFolder(Path(name))  # the run as seen from the folder that contains it
        self.missing: list[tuple[str, str, str]] = []  # part, reason, and the command that creates it
        # Lines of metrics.jsonl that belong to a step, by kind
        self.lines: dict[str, list[Tree]] = defaultdict(list)
        for row in folder.history():
            if isinstance(row.get("step"), int):
                self.lines[str(row.get("kind"))].append(row)
        # A step that was repeated after an interruption has its last line
        self.steps: dict[int, Tree] = {row["step"]: row for row in self.lines["step"]}
        if not self.steps:
            self.missing.append(("training log", "metrics.jsonl has no steps", "written by training"))
        train = _code(named.resume_command())
        score, audit = (_code(command(word, named.path)) for word in ("eval", "audit"))
        self.weights: Tree = self._read(  # metadata: step, weights
            folder.model_file, "final weights", train, load_metadata, "training did not finish"
        )
        pack = _code(command("pack" if folder.quantized_file.is_file() else "quantize", named.path))
        packed = self._read(folder.artifact_file, "artifact", pack, _artifact, "the run is not packed")
        self.artifact: ArtifactTable | None = packed.get("table")
        scores = self._read(folder.scores_file("artifact"), "scores of the artifact", score)
        score_float = _code(command("eval", named.path, "--weights", "float"))
        floats = self._read(folder.scores_file("float"), "scores of the float weights", score_float)
        self.scores: dict[str, Tree] = {}
        for weights, tree, made_by in (("artifact", scores, score), ("float", floats, score_float)):
            if tree:
                shown = {k: v for k, v in tree.items() if k not in SCORES or isinstance(v, dict)}
                self.scores[weights] = shown
                self._read(folder.path / f"scores_{weights}.json", f"{weights} scores", made_by, read_scores)
        self.audit: Tree = self._read(folder.audit_file, "audit", audit)
        for what, tree, made_by in (("scores", scores, score), ("audit", self.audit, audit)):
            if packed and tree.get("artifact_sha256") not in (None, packed["sha256"]):
                part = f"{what} of the current artifact"
                self.missing.append((part, "those shown are of another artifact", made_by))
        self.sweep: Tree = {}
        if folder.sweep_file.is_file():  # optional, so not missing
            self.sweep = self._read(folder.sweep_file, "sweep", _code(command("ttt-sweep", named.path)))
        self.environment: Tree = self._read(folder.path / "env.json", "environment", "written by training")

    def _read(
        self, path: Path, what: str, made_by: str, load: Callable[[Path], Any] = read_json, why: str = ""
    ) -> Any:
        """Load a file; if it is missing or damaged, record that and return {}."""
        if path.is_file():
            try:
                return load(path)
            except (PgolfError, OSError) as error:
                why = portable(str(error))
        self.missing.append((what, why or f"there is no {path.name}", made_by))
        return {}

    @property
    def seconds(self) -> float:
        """Training time up to the last step; NaN if unknown."""
        return as_float(self.steps[max(self.steps)].get("elapsed")) if self.steps else math.nan

    @property
    def broken_steps(self) -> list[int]:
        """Steps whose loss is not finite."""
        return [s for s in sorted(self.steps) if not math.isfinite(as_float(self.steps[s].get("loss")))]


def write_report(folder: RunFolder, out: Path) -> Path:
    """Write the HTML report of a run folder in any state and return its path.

    Raises PgolfError if `folder` has no readable config.json.
    """
    run = RunRecord(folder)
    makers = [overview, missing, configuration, training, throughput, scores, quantization_gap, adaptation]
    makers += [parts, artifact_bytes, audit, environment]
    sections = {make: _guarded(make, run) for make in makers}
    sections[missing] = missing(run)  # again, with the files that a section could not show
    shown = list(sections.values())
    write_text(out, render("run", f"Run {run.name}", shown, config=run.config, version=__version__))
    return out


def _guarded(make: Callable[[RunRecord], Section], run: RunRecord) -> Section:
    """Make a section, or report that its files are invalid, as they may have been edited."""
    title = TITLES.get(make.__name__, make.__name__.replace("_", " ").capitalize())
    try:
        return make(run)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"a file of the run is incomplete or damaged ({type(error).__name__}: {error})"
        run.missing.append((title, portable(reason), "the command that wrote the file"))
        return Section(title, f"Not shown: {reason}.")


def _code(words: str) -> str:
    """Return a command as code in a page's text."""
    fence = "``" if "`" in words else "`"
    return f"{fence}{words}{fence}"


def overview(run: RunRecord) -> Section:
    """Summarize the run in one table."""
    m, train = run.config.model, run.config.train
    last = max(run.steps, default=0)
    if run.folder.model_file.is_file():
        state = "trained to the end" if run.steps else "imported weights, not trained here"
    elif run.steps:
        limit = f" or {console.duration(train.max_seconds)}" if train.max_seconds else ""
        state = f"interrupted or still running: step {last:,} of {train.steps:,}{limit}"
    else:
        state = "not trained yet: only the configuration exists"
    rows = {"preset": run.config.name, "state": state}
    rows["network"] = f"{m.num_layers} layers x {m.model_dim}, {m.num_parameters():,} parameters"
    if run.steps:
        unrecorded = (last - len(run.steps)) * train.batch_tokens
        tokens = sum(row["tokens"] for row in run.steps.values()) + unrecorded
        rows["trained on"] = f"{tokens:,} tokens in {console.duration(run.seconds)}"
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
    for ended in run.lines["end"][-1:]:
        if never := ended.get("unfinished"):
            text += f"\n\nThe schedule did not end: {'; '.join(map(str, never))}."
    return Section("Overview", text, (Table(("property", "value"), rows.items()),))


def missing(run: RunRecord) -> Section:
    """List the parts that are not available, with the command that creates each."""
    if not run.missing:
        return Section("What is missing", "Nothing: the run is trained, packed, scored and audited.")
    text = f"Run the commands in the folder that contains {_code(run.name)}."
    return Section("What is missing", text, (Table(("part", "reason", "created by"), run.missing),))


def configuration(run: RunRecord) -> Section:
    """List the fields that differ from the preset, and what changed when the run resumed."""
    changes = [
        (row["step"], text) for row in run.lines["resume"] for text in row.get("changed") or ["nothing"]
    ]
    resumed = Table(("resumed at step", "changed"), changes, "Interruptions")
    now = dict(flatten(run.config))
    try:
        before = dict(flatten(preset(run.config.name)))
    except PgolfError:
        fields = [(name, _setting(name, value)) for name, value in now.items()]
        text = f"`{run.config.name}` is not the name of a preset; these are all fields."
        return Section("Configuration", text, (Table(("field", "run"), fields), resumed))
    disabled = tuple(f"{name}." for name in {*now, *before} if now.get(name, ...) is None)
    rows = [
        (name, *(_setting(name, fields.get(name, "on")) for fields in (before, now)))
        for name in dict.fromkeys([*now, *before])
        if now.get(name, ...) != before.get(name, ...) and name != "name" and not name.startswith(disabled)
    ]
    if not rows:
        return Section("Configuration", f"Preset `{run.config.name}`, unchanged.", [resumed])
    text = f"Differences from the current preset `{run.config.name}`. Where a preset leaves a choice to the "
    text += "machine (`auto`, `none`), training records what it chose."
    differences = Table(("field", "preset", "run"), rows, f"{len(rows)} fields that differ")
    return Section("Configuration", text, (differences, resumed))


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
        return Section("Training", "No steps are recorded.", [_validations(run)])
    losses = {s: loss for s in sorted(run.steps) if math.isfinite(loss := as_float(run.steps[s].get("loss")))}
    batch = run.config.train.batch_tokens
    text = f"Loss of batches of {batch:,} tokens, before the step that learns from them."
    if weight := run.config.train.z_loss:
        text += f" It includes z-loss, {weight:g} times the squared log-sum-exp of the logits."
    if losses:
        first, last = min(losses), max(losses)
        text += f" Step {first:,} had {losses[first]:.4f} nats per token, "
        text += f"step {last:,} had {losses[last]:.4f}."
    if broken := run.broken_steps:
        more, listed = len(broken) - LONGEST_LIST, ", ".join(f"{s:,}" for s in broken[:LONGEST_LIST])
        text += f"\n\nThe loss is not finite at {len(broken):,} of {len(run.steps):,} steps: {listed}"
        text += f" and {more:,} more." if more > 0 else "."
    note, figures = _plot(
        lambda canvas: plots.paint_training(canvas, run.steps, run.lines["val"]),
        (WIDTH, 4.8),
        "Training loss and validation by step; below, the learning-rate multiplier.",
        "Loss by step, and below it the factor on all learning rates.",
    )
    return Section("Training", text + note, (_validations(run), _slot_rates(run)), figures)


def _validations(run: RunRecord) -> Table:
    rows = [
        (row["step"], row.get("weights", ""), *(number(row.get(unit), ".4f") for unit in ("loss", "bpb")))
        for row in run.lines["val"]
    ]
    return Table(("step", "weights", "nats/token", "bpb"), rows, "Validation, non-overlapping windows")


def _slot_rates(run: RunRecord) -> Table:
    """Tabulate the last recorded MetaSGD factors on the inner learning rate, which start at 1."""
    last: Tree = {"step": 0, **(run.lines["slot_rates"] or [{}])[-1]}
    rows = [
        (bank, len(rates), *(f"{v:.4f}" for v in (min(rates), sum(rates) / len(rates), max(rates))))
        for bank, rates in last.items()
        if isinstance(rates, list) and rates
    ]
    header = ("bank", "slots", "min", "mean", "max")
    return Table(header, rows, f"Learned rates of the inner step (MetaSGD) at step {last['step']:,}")


def throughput(run: RunRecord) -> Section:
    """Show tokens per second, and the time of each kind of step."""
    table = pace_table(run.steps)
    if not table.rows:
        return Section("Throughput", "No two successive steps are recorded with their times.")
    text = "Time of a step by the training clock, which excludes validation and checkpoints; "
    text += f"{console.duration(run.seconds)} in total."
    note, figures = _plot(
        lambda canvas: plots.paint_pace(canvas.subplots(), run.steps),
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
    text = "The three scores of the same weights belong together: the gain of test-time training is the "
    text += "third less the second, and the gain of sliding windows is the second less the first."
    return Section("Scores", text, score_tables)


def _gains(tree: Tree) -> Table:
    steps = {"sliding windows": ("non_overlapping", "sliding"), "TTT": ("sliding", "sliding_ttt")}
    rows = []
    for what, (old, new) in steps.items():
        if _is_scored(tree, old) and _is_scored(tree, new):
            gains = (f"{tree[new][unit] - tree[old][unit]:+.6f}" for unit in ("bpb", "loss"))
            rows.append((labeled(what, what == "TTT" and tree.get("illegal")), *gains))
    return Table(("change by", "bpb", "nats/token"), rows)


def _score_name(tree: Tree, key: str) -> str:
    return labeled(SCORES[key], key == "sliding_ttt" and tree.get("illegal"))


def _is_scored(tree: Tree, key: str) -> bool:
    score = tree.get(key)
    return isinstance(score, dict) and all(math.isfinite(as_float(score.get(u))) for u in ("bpb", "loss"))


def _conditions(scores: Tree, name: str) -> list[object]:
    """Return what score `name` in a scores file depends on besides the weights."""
    fields = ("seq_len",) if name == "non_overlapping" else ("seq_len", "stride", "repeat_tail")
    # rounding of the banks counts as part of the weights: float ones never do it
    ttt = {**scores.get("ttt", {}), "quantize_forward": None} if name == "sliding_ttt" else None
    return [scores[name]["tokens"], ttt, *(scores.get("eval", {}).get(field) for field in fields)]


def quantization_gap(run: RunRecord) -> Section:
    """Subtract from the artifact's scores the float scores, or else the validation at the end of training."""
    title = "Quantization gap"
    artifact, floats = run.scores.get("artifact", {}), run.scores.get("float", {})
    if not artifact:
        return Section(title, "Unknown: the artifact is not scored.")
    both = [key for key in SCORES if _is_scored(artifact, key) and _is_scored(floats, key)]
    differing = [key for key in both if _conditions(artifact, key) != _conditions(floats, key)]
    pairs = {_score_name(artifact, key): (floats[key], artifact[key]) for key in both if key not in differing}
    text = "Loss of the artifact relative to the float weights on the same targets; positive is worse."
    if differing:
        names = "; ".join(_score_name(artifact, key) for key in differing)
        text += " Not comparable, because float weights and artifact were scored on different targets or "
        text += f"with other settings: {names}."
    elif not pairs and (ended := _final_validation(run)) and _is_scored(artifact, "non_overlapping"):
        pairs = {SCORES["non_overlapping"]: (ended, artifact["non_overlapping"])}
        text += " The float weights are not scored; their score here is the validation at the end of "
        text += f"training ({ended['weights']}), over the same windows unless `pgolf eval` was given others."
    rows = []
    for what, (floating, packed) in pairs.items():
        gaps = (packed[unit] - as_float(floating[unit]) for unit in ("bpb", "loss"))
        bpbs = (as_float(floating["bpb"]), packed["bpb"])
        rows.append((what, *(f"{bpb:.6f}" for bpb in bpbs), *(f"{gap:+.6f}" for gap in gaps)))
    if not rows and not differing:
        return Section(title, "Unknown: the float weights are not scored.")
    header = ("windows", "float bpb", "artifact bpb", "gap, bpb", "gap, nats/token")
    return Section(title, text, [Table(header, rows)])


def _final_validation(run: RunRecord) -> Tree | None:
    """Return that of the weights in model.safetensors: the average or, after Reptile, the last step's."""
    kept = [run.weights.get(name, ...) for name in ("step", "weights")]
    return next((row for row in run.lines["val"] if [row["step"], row.get("weights")] == kept), None)


def adaptation(run: RunRecord) -> Section:
    """Show the running score by chunk of test-time training, and the sweep if there is one."""
    title, tree = "Test-time training", run.scores.get("artifact") or run.scores.get("float", {})
    compared = (sweep_table(run.sweep),) if run.sweep.get("adapters") else ()
    course = tree.get("ttt_bpb_by_chunk") or []
    if not (course and _is_scored(tree, "sliding") and _is_scored(tree, "sliding_ttt")):
        return Section(title, "There is no score with test-time training.", compared)
    updates, trainable = tree.get("ttt_updates", 0), tree.get("ttt_trainable_parameters", 0)
    gain = tree["sliding"]["bpb"] - tree["sliding_ttt"]["bpb"]
    text = f"{len(course):,} chunks, each scored before anything learned from it"
    if illegal := tree.get("illegal"):
        text = f"This BREAKS THE RULES of the challenge: {illegal}"
    text += f"; {updates:,} updates of {trainable:,} parameters. The gain is {gain:+.6f} bits per byte "
    text += "over the same windows without it."
    if settings := _ttt_settings(tree.get("ttt", {})):
        text += f" Settings: {settings}."
    note, figures = _plot(
        lambda canvas: plots.paint_course(canvas.subplots(), tree),
        (WIDTH, 3.4),
        "Running bits per byte by chunk of test-time training, and the sliding score without it.",
        "Bits per byte up to each chunk, in the order of scoring. The dotted line is the whole stream "
        "without test-time training: only the right end compares with it.",
    )
    return Section(title, text + note, compared, figures)


def _ttt_settings(ttt: Tree) -> str:
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
        lambda canvas: plots.paint_parts(canvas.subplots(1, 3), tree),
        (10.5, 3.6),
        "Shares by class of target; bits per byte by tokens of context and by length of document.",
    )
    text = f"Parts of the scores of the {weights} weights." + note
    return Section(title, text, tables(tree["figures"], illegal=tree.get("illegal")), figures)


def artifact_bytes(run: RunRecord) -> Section:
    """Show the bytes of the artifact by section, and what remains of the limit."""
    table, pack = run.artifact, run.config.pack
    if table is None:
        return Section("Bytes", "There is no artifact.")
    code = code_bytes() if pack.code_bytes is None else pack.code_bytes
    total, limit = table.total_bytes + code, pack.limit_bytes
    left, over = f"{limit - total:,} bytes are left", f"that is {total - limit:,} bytes too many"
    fits = left if total <= limit else over
    text = f"Artifact {table.total_bytes:,} + code {code:,} = {total:,} bytes of {limit:,}: {fits}."
    note, figures = _plot(
        lambda canvas: plots.paint_treemap(canvas, table),
        plots.TREEMAP_SIZE,
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


def _verdict(tree: Tree) -> str:
    findings = tree.get("findings") or []
    failed = [f["id"] for f in findings if f["passed"] is False]
    held, skipped = (sum(f["passed"] is answer for f in findings) for answer in (True, None))
    unclear = f", {skipped} could not be checked" if skipped else ""
    text = f"{held} of {len(findings)} properties hold{unclear}"
    return f"FAILED: {', '.join(failed)} ({text})" if failed else text


def environment(run: RunRecord) -> Section:
    """List the machine and the versions that training recorded."""
    if not run.environment:
        return Section("Environment", "There is no env.json: machine and versions are unknown.")
    rows = [(key.replace("_", " "), "none" if v is None else v) for key, v in run.environment.items()]
    return Section("Environment", "As recorded by training.", (Table(("property", "value"), rows),))


def _plot(
    paint: drawing.Paint, size: tuple[float, float], alt: str, caption: str = ""
) -> tuple[str, tuple[Figure, ...]]:
    """Draw a figure for light and dark screens; if that fails, return a paragraph that says why instead."""
    try:
        light, dark = (drawing.png(paint, size, dark=dark) for dark in (False, True))
    except PgolfError as error:
        return f"\n\nNo plot: {error}.", ()
    return "", (Figure(light, dark, caption, alt),)
