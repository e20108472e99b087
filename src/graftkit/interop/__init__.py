"""Packs and LoRA adapters: each becomes the other.

adapter       a PEFT directory as settings and factors, checked and never unpickled
places        which checkpoint tensor a module of an adapter means
peft_import   adapter to pack, without loss
truncation    best factors of a given rank
peft_export   pack to adapter, with what that loses
"""

from graftkit.interop.peft_export import LoraExport, export_lora
from graftkit.interop.peft_import import import_lora, read_lora

__all__ = ["LoraExport", "export_lora", "import_lora", "read_lora"]
