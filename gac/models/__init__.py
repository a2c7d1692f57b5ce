"Models of the study; TerraTorch is imported here once, without the notices of its optional parts."
import logging, warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore'); logging.disable(logging.WARNING)
    import terratorch.models.backbones.terramind, terratorch.models.backbones.prithvi_mae
    logging.disable(logging.NOTSET)

from . import build  # enters the miniatures into TerraTorch's registries
