"""Published ways to store a delta, each re-implemented from its paper and packed to real bytes.

Nothing here is copied from anyone's code. Every file is decoded from the target and itself alone.
"""
