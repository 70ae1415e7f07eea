from .t5 import T5Encoder
