__version__ = "0.1.0"

from .core.processor import pin_processor as _pin_processor

_pin_processor()  # before numpy and torch are loaded: they choose their routines once

from .core import torchvision as _torchvision  # noqa: E402 before anything imports torchvision: an installation built for another torch is mended
