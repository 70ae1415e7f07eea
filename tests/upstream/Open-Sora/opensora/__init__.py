from .acceleration import *
from .datasets import *
from .models import *
from .registry import *
