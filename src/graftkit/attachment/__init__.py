"""Attach: reversible use of packs on a live model.

A pack is either *merged*, its tuned tensors copied into the model's parameters, or it lies *beside*
the model, and forward hooks add its weight delta for the rows of a batch that use it. How a row
gets its pack beside the model:

1. `attach` (attachment) checks that the model is the pack's target (target). `SidePacks` (side)
   finds the modules that the pack changes, and gives each a `ModuleDeltas` with its hooks.
2. `Attachment.route` turns the choice of every row into `RoutedRows` (rows), kept by `Routing` for
   the batches of this thread. Rows of different packs pass only if a trial batch shows that the
   model keeps the rows of a batch apart (separation).
3. When the model runs, `BatchGuard` (calls) lets one batch through at a time. It also refuses a
   pack of which the model reads a weight without calling the weight's module.
4. In each module the hook of `ModuleDeltas` (modules) looks up the packs' shares in the rows and
   adds x ΔWᵀ of each, or runs the module again with tuned parameters.

attachment     attach, detach, add, drop and route; a pack merged into the model's parameters
target         the live model as the target of packs
configuration  what a pack changes beside the weights: config.json, generation settings, tokenizer
side           packs beside the model
modules        all packs' deltas in one module, and their hooks
updates        the forms of one delta: low-rank, a few rows, dense; factors of several packs stacked
rows           which packs every row of a batch uses
calls          one batch at a time, and no weight read without a call of its module
separation     a trial batch shows whether rows may use different packs
"""

from graftkit.attachment.attachment import Attachment, attach, attached, detach, without_packs
from graftkit.attachment.rows import PackChoice

__all__ = ["Attachment", "PackChoice", "attach", "attached", "detach", "without_packs"]
