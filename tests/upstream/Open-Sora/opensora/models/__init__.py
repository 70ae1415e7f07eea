from .stdit import *
from .text_encoder import *
from .vae import *
