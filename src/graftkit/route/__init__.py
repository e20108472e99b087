"""Route: which packs answer a prompt, or none of them.

base        what a router is, and the router by name
key         what a pack carries so that prompts find it
centroid    the pack whose key a prompt fits best, or the target
classifier  a small trained net; labels are the packs of lowest loss
spectral    from the packs' weights alone
"""

from graftkit.route.base import TARGET, FixedRouter, Route, Router

__all__ = ["TARGET", "FixedRouter", "Route", "Router"]
