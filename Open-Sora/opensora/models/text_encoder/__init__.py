from .t5 import T5Encoder, text_preprocessing

__all__ = ["T5Encoder", "text_preprocessing"]
