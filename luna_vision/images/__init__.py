"""Image files, from finding them on. Needs neither Lightning nor an augmentation library."""

from .find import IMG_EXTENSIONS, class_folders, find_images, split_folder, walk

__all__ = ["IMG_EXTENSIONS", "class_folders", "find_images", "split_folder", "walk"]
