from .rf import RFLOW
