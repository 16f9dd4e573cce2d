"""Weights to integers: grids, GPTQ, rate-distortion, calibration, fake quantization."""
