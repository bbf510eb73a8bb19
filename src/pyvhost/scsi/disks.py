"""Logical units as a user names them: made of a store or its spec, and given another size.

Promises: a disk that is given no serial number has the same one each time: a file's own wherever it is, a memory's
of its place. Never: opens a store.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from pyvhost.scsi.nexus import world_wide_name
from pyvhost.scsi.requests import Address
from pyvhost.scsi.stores import spec
from pyvhost.scsi.stores.base import Store
from pyvhost.scsi.stores.descriptor import DescriptorStore
from pyvhost.scsi.stores.file import FileStore
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.wrappers import innermost
from pyvhost.scsi.unit import LogicalUnit
from pyvhost.vhost.errors import VhostError


class Served(NamedTuple):
    """A logical unit that is served: where it is, and what keeps it."""

    target: int
    lun: int
    store: Store


def make_unit(store: Store | str, owner: str, address: Address, serial: str | None = None) -> LogicalUnit:
    """A unit that is not open yet. `owner`: whose it is, by name.

    ValueError: a spec that can't be, or a file that is none of reservations; OSError: no file can be there.
    """
    store = spec.parse(store) if isinstance(store, str) else store
    aptpl = _file_of_reservations(store.aptpl) if store.aptpl else None
    return LogicalUnit(store, serial=serial or store.serial or _serial(store, owner, address), aptpl=aptpl)


def _file_of_reservations(name: str) -> Path:
    path = Path(name).absolute()
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "aptpl is a directory: a file is wanted, of the disk's own", name
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "aptpl: there is no directory for it", name)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "aptpl: its directory can't be written to", name)
    return path


def _serial(store: Store, owner: str, address: Address) -> str:
    kept = innermost(store)
    if isinstance(kept, MemoryStore):
        text = f"{owner} {address.target}:{address.lun}"
    else:
        text = os.path.abspath(kept.path) if isinstance(kept, FileStore) else kept.spec
    return f"{world_wide_name(text):016x}"


def resize(store: Store, size: int | None, who: str) -> None:
    """Looks for a store's new size, or gives it one, in bytes. VhostError EOPNOTSUPP: that is done where it lies."""
    kept = innermost(store)
    if size is None and isinstance(kept, DescriptorStore):
        kept.check_size()
    elif size is not None and isinstance(kept, MemoryStore):
        kept.resize(size)
    else:
        raise VhostError(errno.EOPNOTSUPP, f"{who}: {kept.spec} is resized where it lies")
