"""What a step minimizes: one file for each loss, and for each way to change what a loss is computed on.

`config/losses.py` lists the losses that `loss_type` chooses from.
"""
