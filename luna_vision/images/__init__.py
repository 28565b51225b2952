"""Images: found, opened, decoded, converted, normalised. Needs no Lightning and no albumentations."""

from .find import IMG_EXTENSIONS, class_folders, find_files, find_images, split_folder, walk
from .formats import open_image

__all__ = ["IMG_EXTENSIONS", "class_folders", "find_files", "find_images", "open_image", "split_folder", "walk"]
