"""`simpletuner`: one trainer, many image diffusion model families.

Importing the package imports neither torch nor any model code, so that the command line answers at once.
"""

__version__ = "0.1.0"
