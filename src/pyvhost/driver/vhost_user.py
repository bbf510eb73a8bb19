"""A vhost-user front end over a Unix socket: what a hypervisor does to a back end, one call a message.

Methods are the protocol's requests by name. Every one waits for its answer where one is due: an
acknowledgement too, wherever REPLY_ACK was negotiated. `send` puts any bytes and descriptors on the wire,
for back ends that must stand them.

Promises: every wait ends after the timeout. What the other side does wrong is DeviceError (RefusedError when
it says that a request failed, BackendGoneError when it hangs up), and names the request. Never: starts a
thread; reads the backend's own requests unless asked (`backend_request`, `take_miss`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvhost.abi import vhost, virtio
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.inflight import Inflight
from pyvhost.driver.memory import Region
from pyvhost.driver.queue import Queue
from pyvhost.driver.vhost_user_socket import PROTOCOL_FEATURES as PROTOCOL_FEATURES
from pyvhost.driver.vhost_user_socket import VhostUserSocket
from pyvhost.vhost_user.payloads import (
    U64,
    Config,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    VringAddr,
    VringFile,
    VringState,
)
from pyvhost.vhost_user.payloads import Inflight as InflightRow
from pyvhost.vhost_user.payloads import Region as TableRegion

_BIT_30 = 1 << abi.F_PROTOCOL_FEATURES


class VhostUserFrontend(VhostUserSocket):
    """A vhost-user front end. With `inflight` set to a table (`get_inflight`, of this or of an earlier
    connection) the back end gets it before its first ring starts; the table stays the caller's. With
    `inflight_size` set, (rings, entries), a table is asked for then if there is none.
    """

    inflight: Inflight | None = None
    inflight_size: tuple[int, int] | None = None
    _inflight_given = False

    # --- the device as a whole ---------------------------------------------------------------------------

    def set_owner(self) -> None:
        self.request(Request.SET_OWNER)

    def reset_owner(self) -> None:
        self.request(Request.RESET_OWNER)

    def reset_device(self) -> None:
        self.request(Request.RESET_DEVICE)

    def get_features(self) -> int:
        return self._number(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self.features = features
        self.request(Request.SET_FEATURES, U64(features))

    def get_protocol_features(self) -> int:
        return self._number(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        self.request(Request.SET_PROTOCOL_FEATURES, U64(features))

    def get_queue_num(self) -> int:
        """How many queues (for net: pairs) there are; 1 without the protocol feature MQ."""
        if not self.has(abi.PROTOCOL_F_MQ):
            return 1
        return self._number(Request.GET_QUEUE_NUM)

    def set_status(self, status: int) -> None:
        """Virtio's device status. Nothing is sent without the protocol feature STATUS."""
        if self.has(abi.PROTOCOL_F_STATUS):
            self.request(Request.SET_STATUS, U64(status))

    def get_status(self) -> int:
        return self._number(Request.GET_STATUS)

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space, from `offset`."""
        answer = self.request(Request.GET_CONFIG, Config(offset, 0, bytes(size)))
        assert isinstance(answer, Config)
        if (answer.offset, answer.size) != (offset, size):
            raise DeviceError(
                f"GET_CONFIG of {size} bytes at {offset} was answered with {answer.size} bytes at {answer.offset}"
            )
        return answer.data

    def set_config(self, offset: int, data: bytes, flags: int = abi.SET_CONFIG_TYPE_FRONTEND) -> None:
        self.request(Request.SET_CONFIG, Config(offset, flags, data))

    def send_rarp(self, mac: bytes) -> None:
        self.request(Request.SEND_RARP, U64(int.from_bytes(mac + b"\0\0", "little")))

    def net_set_mtu(self, mtu: int) -> None:
        self.request(Request.NET_SET_MTU, U64(mtu))

    def set_log_base(self, size: int, offset: int, fd: int) -> None:
        """Where the dirty log lies, in bytes of a file."""
        self.request(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def set_log_fd(self, fd: int) -> None:
        """An eventfd to signal when something was logged; -1 for none."""
        self.request(Request.SET_LOG_FD, None, [fd] if fd >= 0 else [])

    def get_inflight(self, num_queues: int, queue_size: int) -> Inflight:
        """Have the back end make a table for so many rings of so many entries; the caller closes it.

        RefusedError when it has no memory to give.
        """
        answer, fd = self.request_fd(Request.GET_INFLIGHT_FD, InflightRow(0, 0, num_queues, queue_size))
        assert isinstance(answer, InflightRow)
        return Inflight(fd, answer.mmap_size, answer.mmap_offset, answer.num_queues, answer.queue_size)

    def set_inflight(self, table: Inflight) -> None:
        row = InflightRow(table.mmap_size, table.mmap_offset, table.num_queues, table.queue_size)
        self.request(Request.SET_INFLIGHT_FD, row, [table.fd])

    # --- memory --------------------------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        """The whole table; more regions than one message holds are added one by one."""
        fit = regions if len(regions) <= abi.MEMORY_BASELINE_NREGIONS else ()
        if regions and not fit and not self.has(abi.PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            raise DriverError(f"{len(regions)} regions need the protocol feature CONFIGURE_MEM_SLOTS")
        if not regions or fit:
            table = MemTable(tuple(_row(region) for region in fit))
            self.request(Request.SET_MEM_TABLE, table, [region.fd for region in fit])
            return
        for region in regions:
            self.add_mem_reg(region)

    def get_max_mem_slots(self) -> int:
        return self._number(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: Region) -> None:
        self.request(Request.ADD_MEM_REG, MemReg(_row(region)), [region.fd])

    def rem_mem_reg(self, region: Region) -> None:
        self.request(Request.REM_MEM_REG, MemReg(_row(region)))

    # --- rings ---------------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        self.request(Request.SET_VRING_NUM, VringState(index, num))

    def set_vring_base(self, index: int, num: int) -> None:
        self.request(Request.SET_VRING_BASE, VringState(index, num))

    def get_vring_base(self, index: int) -> int:
        """Stops the ring; returns the next available index that the back end would have looked at."""
        answer = self.request(Request.GET_VRING_BASE, VringState(index, 0))
        assert isinstance(answer, VringState)
        if answer.index != index:
            raise DeviceError(f"GET_VRING_BASE of ring {index} was answered for ring {answer.index}")
        return answer.num

    def set_vring_addr(
        self,
        index: int,
        desc_user_addr: int,
        used_user_addr: int,
        avail_user_addr: int,
        *,
        flags: int = 0,
        log_guest_addr: int = 0,
    ) -> None:
        """User addresses, as the memory table has them."""
        addresses = VringAddr(index, flags, desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr)
        self.request(Request.SET_VRING_ADDR, addresses)

    def set_vring_endian(self, index: int, num: int) -> None:
        """VRING_LITTLE_ENDIAN or VRING_BIG_ENDIAN, of a legacy guest (protocol feature CROSS_ENDIAN)."""
        self.request(Request.SET_VRING_ENDIAN, VringState(index, num))

    def get_vring_base_skip_drain(self, index: int) -> int:
        """Stops the ring without waiting for the chains in flight (GET_VRING_BASE_SKIP_DRAIN)."""
        answer = self.request(Request.GET_VRING_BASE_SKIP_DRAIN, VringState(index, 0))
        assert isinstance(answer, VringState)
        return answer.num

    def set_vring_kick(self, index: int, fd: int = -1) -> None:
        """Starts the ring. -1 sends no descriptor: the back end polls."""
        self._vring_file(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int = -1) -> None:
        self._vring_file(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int = -1) -> None:
        self._vring_file(Request.SET_VRING_ERR, index, fd)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        self.request(Request.SET_VRING_ENABLE, VringState(index, int(enable)))

    def _vring_file(self, request: Request, index: int, fd: int) -> None:
        self.request(request, VringFile(index, no_fd=fd < 0), [] if fd < 0 else [fd])

    # --- several at once ---------------------------------------------------------------------------------

    def negotiate(self, features: int) -> int:
        """Own the device, and acknowledge those of `features` that it offers; returns them.

        Bit 30 goes by itself, unless `protocol_features` is 0 or the back end has none. With BACKEND_REQ
        negotiated the back end gets its channel.
        """
        self.set_owner()
        offered = self.get_features()
        if self.protocol_features and offered & _BIT_30:
            self.set_protocol_features(self.get_protocol_features() & self.protocol_features)
            if self.has(abi.PROTOCOL_F_BACKEND_REQ):
                self.set_backend_req_fd()
                # As QEMU does: a back end may offer more to a front end that it can ask (ACCESS_PLATFORM).
                offered = self.get_features()
            acked = offered & features & ~_BIT_30
            self.set_features(acked | _BIT_30)
        else:
            acked = offered & features & ~_BIT_30
            self.set_features(acked)
        return acked

    def start_ring(self, index: int, queue: Queue, base: int | None = None) -> None:
        """Everything that ring `index` needs to run; `base` None is its used index, as it stands in memory.

        The kick descriptor, which starts the ring, comes last, and then enabling, where bit 30 was
        negotiated.
        """
        ring = queue.ring
        if self.inflight is None and self.inflight_size is not None:
            self.inflight = self.get_inflight(*self.inflight_size)
        if self.inflight is not None and not self._inflight_given:
            self.set_inflight(self.inflight)
            self._inflight_given = True
        self.set_vring_num(index, ring.size)
        self.set_vring_base(index, ring.used_idx if base is None else base)
        if self.has(abi.PROTOCOL_F_CROSS_ENDIAN) and not self.features >> virtio.F_VERSION_1 & 1:
            self.set_vring_endian(index, int(ring.byteorder == "big"))
        elif ring.byteorder == "big":
            raise DriverError(f"ring {index} is big-endian, and CROSS_ENDIAN was not negotiated")
        self.set_ring_addr(index, queue)
        self.set_vring_call(index, queue.call_fd)
        self.set_vring_err(index, queue.err_fd)
        self.set_vring_kick(index, queue.kick_fd)
        if self.features & _BIT_30:
            self.set_vring_enable(index, True)

    def stop_ring(self, index: int) -> int:
        """Disable the ring where it can be, and stop it; returns its base."""
        if self.features & _BIT_30:
            self.set_vring_enable(index, False)
        return self.get_vring_base(index)

    def change_features(self, features: int) -> None:
        """Acknowledge other features than before; bit 30 stays as it was."""
        self.set_features(features & ~_BIT_30 | self.features & _BIT_30)

    def set_ring_addr(self, index: int, queue: Queue, *, log: bool = False) -> None:
        """Where the ring lies now; with `log` its used ring's own guest address is where writes are logged."""
        at = queue.ring.addresses
        flags = int(log) << vhost.VRING_F_LOG
        log_at = queue.ring.layout.used if log else 0
        self.set_vring_addr(index, at.desc, at.used, at.avail, flags=flags, log_guest_addr=log_at)

    def set_log(self, log: DirtyLog) -> None:
        """Give the back end the log's file."""
        if not self.has(abi.PROTOCOL_F_LOG_SHMFD):
            raise DriverError("a dirty log needs the protocol feature LOG_SHMFD")
        self.set_log_base(log.size, log.offset, log.fd)

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        self.iotlb_message(Iotlb(iova, size, uaddr, perm, vhost.IOTLB_UPDATE))

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        self.iotlb_message(Iotlb(iova, size, 0, 0, vhost.IOTLB_INVALIDATE))

    def iotlb_message(self, message: Iotlb) -> None:
        """Send any message; it is always answered. RefusedError when the answer is not 0."""
        self.request(Request.IOTLB_MSG, message)

    def sync(self) -> None:
        """Wait until everything sent before was dealt with; GET_FEATURES does for this, and is always
        answered.
        """
        self.get_features()


def _row(region: Region) -> TableRegion:
    return TableRegion(region.guest_phys_addr, region.memory_size, region.userspace_addr, region.mmap_offset)
