"""The rules of the challenge as checks that run: on a run, an artifact, or anything that scores like them."""
