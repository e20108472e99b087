"""Interop: packs from LoRA adapters, and LoRA adapters from packs.

adapter      a PEFT directory as settings and factors, and the target's tensors they belong to
lora_import  adapter to pack, without loss
lora_export  pack to adapter, with a measure of the loss
"""

from graftkit.interop.lora_export import LoraExport, export_lora
from graftkit.interop.lora_import import import_lora, read_lora

__all__ = ["LoraExport", "export_lora", "import_lora", "read_lora"]
