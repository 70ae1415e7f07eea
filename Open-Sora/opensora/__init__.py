"""The Open-Sora 1.2 model stack: models, rectified-flow maths, aspect tables and text cleaning."""
