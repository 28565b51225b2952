"""Mistakes of the user, which a command reports in one line. All other errors are bugs and keep their traceback."""

import dis
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "arguments_of", "is_check", "one_line"]


class UserError(ValueError):
    """A mistake of the user, which the message explains. A command prints it in one line and exits with 2."""


def is_check(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` of this package, as in its documented checks.

    Libraries and bugs also raise ValueErrors, which do not concern what a user gave.
    """
    if isinstance(error, UserError):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code, module = innermost.tb_frame.f_code, innermost.tb_frame.f_globals.get("__name__", "")
    raising = dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"
    return raising and module.partition(".")[0] == "luna_vision"


@contextmanager
def arguments_of(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """A block that passes a user's arguments to a library; the library's errors about them become a UserError.

    Args:
        what: The name of the arguments in the error.
        *kinds: Errors besides TypeError and ValueError that the library raises about its arguments.

    Raises:
        UserError: Instead of such an error, unless it comes from a check of this package.
    """
    try:
        yield
    except (TypeError, ValueError, *kinds) as error:
        if is_check(error):
            raise
        raise UserError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
