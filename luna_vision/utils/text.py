"""Text from strangers: names of files, and what checkpoints say."""

import re

__all__ = ["csv_cell", "printable", "utf8"]

_SURROGATES = "\ud800-\udfff"  # bytes of file names that are no UTF-8, and what JSON can escape
_STEERING = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # terminals, and the direction of writing
_FORMULA = re.compile("[=+\\-@\uff1d\uff0b\uff0d\uff20\t\r\n']")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def utf8(text: str) -> str:
    r"""Text as UTF-8 can hold it: bytes of a file name that are no UTF-8 become \xNN."""
    return re.sub(f"[{_SURROGATES}]", _escape, text)


def printable(text: str) -> str:
    r"""Text that steers no terminal: escapes and line breaks become \xNN or \uNNNN, as does what is no UTF-8."""
    return re.sub(f"[{_SURROGATES}{_STEERING}]", _escape, text)


def _escape(found: re.Match) -> str:
    code = ord(found[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def csv_cell(text: str) -> str:
    """Text for a cell of a CSV file, which no spreadsheet takes for a formula.

    What begins as a formula may (= + - @, also in full width, a tab, a line break) or with an apostrophe, and is no
    number, gets an apostrophe before it. So the first apostrophe of a cell, if there is one, is to be left out.
    """
    return f"'{utf8(text)}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else utf8(text)
