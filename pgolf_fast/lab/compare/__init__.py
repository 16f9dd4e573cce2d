"""Compare runs: ablations, groups of seeds, and sweeps over test-time training adapters."""
