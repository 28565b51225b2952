"""Where an export goes, checked before the work."""

from pathlib import Path

from ..utils.files import check_folder

__all__ = ["SUFFIXES", "check_target"]

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "hf": ""}  # by format; a folder has none


def check_target(path: Path, format: str, overwrite: bool) -> None:
    """Find out whether an export may and can be written, and make the folder that it goes into.

    Raises:
        ValueError: Another suffix than the format's, or something that is there and not to be replaced.
        OSError: Nothing can be written there.
    """
    suffix = SUFFIXES[format]
    if suffix and path.suffix != suffix:
        raise ValueError(f"a file of format {format} must end in {suffix}, got {path}")
    if suffix and path.is_dir():
        raise ValueError(f"{path} is a folder; format {format} writes a file")
    if not suffix and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; format {format} writes a folder")
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise ValueError(f"{path} {'exists' if suffix else 'is not empty'}: --overwrite replaces what is there")
    check_folder(path if path.is_dir() else path.parent)
