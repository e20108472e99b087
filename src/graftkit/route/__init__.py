"""Route: choose the packs that answer a prompt, or the target.

key         what a router is; what a pack stores: statistics of its prompts' hidden states
encoder     the sentence encoder, and the general prompts
nearest     the default router: the pack whose prompts are nearest, or the target
centroid    the fallback without a sentence encoder: Gaussians of the target's states
classifier  a small trained net; its labels are the packs of lowest loss
spectral    routing from the packs' weights alone
"""

from graftkit.route.key import TARGET, FixedRouter, Route, Router

__all__ = ["TARGET", "FixedRouter", "Route", "Router"]
