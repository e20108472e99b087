"""Route: choose the packs that answer a prompt, or the target.

base        what a router is, and the router that always chooses one pack
key         what a pack stores for routing: statistics of its prompts' hidden states
centroid    the default router: the pack whose key a prompt fits best, or the target
classifier  a small trained net; its labels are the packs of lowest loss
spectral    routing from the packs' weights alone
"""

from graftkit.route.base import TARGET, FixedRouter, Route, Router

__all__ = ["TARGET", "FixedRouter", "Route", "Router"]
