"""Settings of a run: schema, presets, the community's environment names."""
