from .stdit3 import STDiT3, STDiT3_3B_2, STDiT3_XL_2, STDiT3Config, TextContext

__all__ = ["STDiT3", "STDiT3_3B_2", "STDiT3_XL_2", "STDiT3Config", "TextContext"]
