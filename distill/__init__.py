"""Teach a converted model to behave like the original, on samples that the original makes itself.

`prepare.py` makes the samples. Of the training, `losses.py` has the objective, `batches.py` what a step learns from,
`trainer.py` the loop, and `train.py` a run from its settings to its adapter.
`accelerate launch -m lineardit.distill CONFIG.toml` is the command.
"""
