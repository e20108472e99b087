"""graftkit keeps what a fine-tune learned in one small file and attaches it when it is wanted."""

__version__ = "0.1.0"
