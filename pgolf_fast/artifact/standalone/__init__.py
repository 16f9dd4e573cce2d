"""The evaluation script of a submission, in readable parts: `artifact/submission.py` makes one file of them.

The package itself imports none of them. They import nothing of it but each other and the rANS decoder, all of
which the one file holds, and may use torch, numpy, sentencepiece and the standard library. No name may be
defined in two of them.
"""
