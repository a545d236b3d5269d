"""Train a converted model to match the original, on samples that the original generates.

`prepare.py` makes the samples. `losses.py` holds the training objective, `batches.py` the inputs of each step,
`trainer.py` the training loop, and `train.py` a run from its settings to its adapter.
`accelerate launch -m lineardit.distill CONFIG.toml` starts a run.
"""
