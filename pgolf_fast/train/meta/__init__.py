"""Training for weights that adapt well: an extra meta step, and Reptile as a last phase."""
