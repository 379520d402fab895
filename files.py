"""Files that are written whole or not at all."""

import os
import uuid


def write_whole(path, write):
    """`write(temporary path)`, then rename: `path` holds what it did or all that is new. Raises OSError, naming `path`.

    write: a function, or the text to write. The temporary file's name is its own, whoever else writes to the folder,
    and short, however long that of `path` is.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(write) if isinstance(write, str) else write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)
