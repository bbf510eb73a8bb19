"""What the host refused, in words for a person.

Promises: one line, which names the file if the error knows one. Never: a traceback.
"""

from __future__ import annotations


def words(error: BaseException) -> str:
    """Of an OSError the host's words and which file it was about; of anything else, what it says."""
    if not isinstance(error, OSError):
        return str(error)
    text = error.strerror or str(error)
    name = error.filename
    if isinstance(name, str) and name and name not in text:
        return f"{name}: {text}"
    return text
