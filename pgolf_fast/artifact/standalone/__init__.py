"""Readable parts of a submission's evaluation script; `artifact/submission.py` bundles them into one file.

The package never imports them. They import only each other and the rANS decoder, which the bundle contains,
plus torch, numpy, sentencepiece and the standard library. No name may be defined in two of them.
"""
