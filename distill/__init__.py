"""Teach a converted model to behave like the original, on samples that the original makes itself.

`prepare.py` makes the samples, `train.py` trains; `accelerate launch -m lineardit.distill CONFIG.toml` is the command.
"""
