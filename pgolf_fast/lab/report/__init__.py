"""One page about a run, from what its folder holds."""
