"""Analyses of trained models: weights, quantization errors, curvature, losses, and bytes of artifacts."""
