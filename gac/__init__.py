__version__ = "0.1.0"

from .core import torchvision as _torchvision  # before anything imports torchvision: an installation built for another torch is mended
