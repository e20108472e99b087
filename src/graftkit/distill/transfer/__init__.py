"""Explicit transfer: distributions and hidden states of the sources, beside the text of SFT rows.

alignment       tokens of two tokenizers for the same text
distributions   what the sources predict in every row, in a file
guide           both signals for a batch of rows
losses          divergences and distances, as functions of tensors
"""
