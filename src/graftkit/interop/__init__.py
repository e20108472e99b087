"""Packs and LoRA adapters: each becomes the other.

adapter      a PEFT directory as settings and factors, and the tensors its modules mean
lora_import  adapter to pack, without loss
lora_export  pack to adapter, with what that loses
"""

from graftkit.interop.lora_export import LoraExport, export_lora
from graftkit.interop.lora_import import import_lora, read_lora

__all__ = ["LoraExport", "export_lora", "import_lora", "read_lora"]
