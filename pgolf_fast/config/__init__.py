"""Settings of a run: dataclasses, presets, dotted fields, run scripts and the run folder."""
