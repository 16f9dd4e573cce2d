"""Weights to integers: grids, GPTQ, calibration, fake quantisation."""
