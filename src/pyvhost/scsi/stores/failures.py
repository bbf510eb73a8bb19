"""Which of the errnos that a logical unit tells apart a failure is.

Promises: every errno becomes one of `base`'s. Never: 0.
"""

from __future__ import annotations

import errno
from typing import Final

_MEANT: Final = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.ENXIO: errno.ENODEV,
    errno.ENOMEDIUM: errno.ENODEV,
    errno.ESTALE: errno.ENODEV,
    errno.ESHUTDOWN: errno.ENODEV,
    errno.ENOTCONN: errno.ENODEV,
    errno.EPERM: errno.EROFS,  # sealed or immutable meanwhile
}
_TOLD: Final = {
    errno.EIO,
    errno.ENOSPC,
    errno.ENODEV,
    errno.EROFS,
    errno.ETIMEDOUT,
    errno.ECANCELED,
    errno.EFAULT,
}


def told(number: int | None) -> int:
    """The errno that is passed on for `number`."""
    meant = _MEANT.get(number or 0, number or 0)
    return meant if meant in _TOLD else errno.EIO
