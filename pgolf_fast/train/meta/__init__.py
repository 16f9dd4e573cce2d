"""Training for weights that adapt well: a meta step beside the ordinary one, and Reptile as a last phase."""
