"""Files that are written whole or not at all, and errors that a line explains."""

import contextlib
import os
import uuid

from config import InputError


@contextlib.contextmanager
def explaining(kinds, what, advice=""):
    """Errors of these kinds inside become an InputError: `what` has failed, why in their own words, and what to do."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what} ({first_words(error)}){advice and f'; {advice}'}") from None


def first_words(error):
    """What an exception says, in one line of at most 200 characters: an OSError of a file without the file's name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


def write_whole(path, write):
    """`write(temporary path)`, then rename: `path` holds what it did or all that is new. Raises OSError, naming `path`.

    write: a function, or the text to write. The temporary file's name is its own, whoever else writes to the folder,
    and short, however long that of `path` is.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(write, newline="\n") if isinstance(write, str) else write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)
