"""Pictures of what the memory reads and of what reads it, and of patch features."""

from .features import FeatureColors, feature_colors, feature_maps
from .figures import fit_colors, plot_features, plot_memory, plot_pack, plot_unpack
from .maps import SlotMaps, pack_maps, slot_maps, telling_slots, unpack_maps
from .view import View, to_pixels, view

__all__ = [
    "FeatureColors",
    "SlotMaps",
    "View",
    "feature_colors",
    "feature_maps",
    "fit_colors",
    "pack_maps",
    "plot_features",
    "plot_memory",
    "plot_pack",
    "plot_unpack",
    "slot_maps",
    "telling_slots",
    "to_pixels",
    "unpack_maps",
    "view",
]
