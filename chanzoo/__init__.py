"""chanzoo: channel methods for timm."""

from . import models

__version__ = "0.1.0"
