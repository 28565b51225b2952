"""Pictures of the memory's attention and of patch features."""

from .features import FeatureColors, feature_maps, fit_colors
from .figures import plot_features, plot_memory
from .maps import SlotMaps, pack_maps, slot_maps, telling_slots, unpack_maps
from .view import View, view

__all__ = [
    "FeatureColors",
    "SlotMaps",
    "View",
    "feature_maps",
    "fit_colors",
    "pack_maps",
    "plot_features",
    "plot_memory",
    "slot_maps",
    "telling_slots",
    "unpack_maps",
    "view",
]
