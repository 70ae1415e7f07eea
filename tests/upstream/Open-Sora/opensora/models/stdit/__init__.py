from .stdit3 import STDiT3
