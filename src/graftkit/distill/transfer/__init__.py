"""Explicit transfer: source distributions and hidden states beside the text of SFT rows."""
