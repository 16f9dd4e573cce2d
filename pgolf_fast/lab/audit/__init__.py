"""Check the rules of the challenge on a run, an artifact, or anything that scores like them."""
