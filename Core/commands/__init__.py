"""The ``vader`` command: one small module for each of its commands, named in ``Core.commands.main``."""
