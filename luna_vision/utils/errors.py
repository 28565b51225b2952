"""What is the user's to mend, and is said in one line. Everything else is a bug, and keeps its traceback."""

import dis
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "arguments_of", "is_check", "one_line"]


class UserError(ValueError):
    """A mistake of the user, which the message explains: a command says it in one line and exits with 2."""


def is_check(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` of this package, as those of its documented checks do.

    Libraries, and mistakes in our own code, raise ValueErrors, too, which are about nothing that a user gave.
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
    """For a call that hands a user's arguments to a library, which says by errors of these kinds that they are wrong.

    Args:
        what: Names them in the error.
        *kinds: TypeError and ValueError, and what else this library raises about its arguments.

    Raises:
        UserError: In the place of such an error, unless that is one of our own checks.
    """
    try:
        yield
    except (TypeError, ValueError, *kinds) as error:
        if is_check(error):
            raise
        raise UserError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
