"""Losses: tensors of trained tokens flow in, one number for each token (or their weighted sum) flows out."""
