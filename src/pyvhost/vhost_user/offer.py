"""What this back end offers a front end of the protocol, and what a request lacks that it does not serve.

Promises: whatever is offered here is served by `backend`. Never: has behaviour.
"""

from __future__ import annotations

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request

#: The protocol feature bits that are offered.
PROTOCOL_FEATURES = sum(
    1 << bit
    for bit in (
        abi.PROTOCOL_F_MQ,
        abi.PROTOCOL_F_LOG_SHMFD,
        abi.PROTOCOL_F_RARP,
        abi.PROTOCOL_F_REPLY_ACK,
        abi.PROTOCOL_F_MTU,
        abi.PROTOCOL_F_BACKEND_REQ,
        abi.PROTOCOL_F_CROSS_ENDIAN,
        abi.PROTOCOL_F_CONFIG,
        abi.PROTOCOL_F_BACKEND_SEND_FD,
        abi.PROTOCOL_F_INFLIGHT_SHMFD,
        abi.PROTOCOL_F_RESET_DEVICE,
        abi.PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        abi.PROTOCOL_F_STATUS,
        abi.PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
        abi.PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
    )
)

_INFLIGHT_SHMFD = 1 << abi.PROTOCOL_F_INFLIGHT_SHMFD
#: What a bit needs beside it, as a mask: "must only be negotiated if" [GET_VRING_BASE].
NEEDS: dict[int, int] = {
    abi.PROTOCOL_F_GET_VRING_BASE_INFLIGHT: _INFLIGHT_SHMFD,
    abi.PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN: _INFLIGHT_SHMFD | 1 << abi.PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
}

_PROTOCOL_F = "the protocol feature "

#: What a request lacks that the specification has and that is not served.
NOT_OFFERED: dict[int, str] = {
    Request.CREATE_CRYPTO_SESSION: _PROTOCOL_F + "CRYPTO_SESSION",
    Request.CLOSE_CRYPTO_SESSION: _PROTOCOL_F + "CRYPTO_SESSION",
    Request.POSTCOPY_ADVISE: _PROTOCOL_F + "PAGEFAULT",
    Request.POSTCOPY_LISTEN: _PROTOCOL_F + "PAGEFAULT",
    Request.POSTCOPY_END: _PROTOCOL_F + "PAGEFAULT",
    Request.GPU_SET_SOCKET: "a GPU",
    Request.VRING_KICK: _PROTOCOL_F + "INBAND_NOTIFICATIONS",
    Request.GET_SHARED_OBJECT: _PROTOCOL_F + "SHARED_OBJECT",
    Request.SET_DEVICE_STATE_FD: _PROTOCOL_F + "DEVICE_STATE",
    Request.CHECK_DEVICE_STATE: _PROTOCOL_F + "DEVICE_STATE",
    Request.GET_SHMEM_CONFIG: _PROTOCOL_F + "SHMEM",
}
