"""Numbers and layouts that others fixed, one module a standard.

Promises: constants carry their C names without the module's prefix, layouts are ctypes structures whose sizes
are checked at import, and only the standard library is imported. Never holds behaviour.
"""

from __future__ import annotations

from pyvhost.abi import vhost as vhost
from pyvhost.abi import vhost_user as vhost_user
from pyvhost.abi import virtio as virtio
from pyvhost.abi import virtio_net as virtio_net
from pyvhost.abi import virtio_scsi as virtio_scsi
from pyvhost.abi import virtio_vsock as virtio_vsock
