"""Compare runs: ablations, seeds, sweeps of adapters."""
