"""Making images out of a teacher: generators, loss terms, and the inverter that searches with them."""

from ssdkd.inversion.generators import ConvGenerator
from ssdkd.inversion.inverter import Inverter, InverterSettings, PyramidInverter, Search, TextureInverter
from ssdkd.inversion.observer import Observer
from ssdkd.inversion.terms import TERMS, Scene, register_term

__all__ = [
    "TERMS",
    "ConvGenerator",
    "Inverter",
    "InverterSettings",
    "Observer",
    "PyramidInverter",
    "Scene",
    "Search",
    "TextureInverter",
    "register_term",
]
