"""Text from untrusted sources: names of files, and the content of checkpoints."""

import re
from collections.abc import Sequence

__all__ = ["csv_cell", "csv_separator", "printable", "utf8"]

_SURROGATES = "\ud800-\udfff"  # bytes of file names that are no UTF-8, and escapes of JSON
_STEERING = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # terminals, and the direction of writing
_FORMULA = re.compile("[=+\\-@\uff1d\uff0b\uff0d\uff20\t\r\n']")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def utf8(text: str) -> str:
    r"""Text that UTF-8 can encode: bytes of a file name that are no UTF-8 become \xNN."""
    return re.sub(f"[{_SURROGATES}]", _escape, text)


def printable(text: str) -> str:
    r"""Text without control characters: escapes, line breaks and bytes that are no UTF-8 become \xNN or \uNNNN."""
    return re.sub(f"[{_SURROGATES}{_STEERING}]", _escape, text)


def _escape(found: re.Match) -> str:
    code = ord(found[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def csv_cell(text: str) -> str:
    """Text for a cell of a CSV file that no spreadsheet runs as a formula.

    Text that begins like a formula (= + - @, also in full width, a tab, a line break) or with an apostrophe, and is no
    number, gets an apostrophe in front. A reader must therefore remove the first apostrophe of a cell.
    """
    return f"'{utf8(text)}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else utf8(text)


def csv_separator(lines: Sequence[str]) -> str:
    """What separates the cells of a table, by its header: Excel's CSV has semicolons where a comma is in numbers."""
    header = next((line for line in lines if line.strip(" ,;\t\r\n")), "")
    return max(",;\t", key=header.count)
