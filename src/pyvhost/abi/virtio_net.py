"""The network device: feature bits, frame headers, configuration space, control queue.

Source: virtio 1.3, 5.1, and Linux's virtio_net.h. Names are the header's without `VIRTIO_NET_`; feature bits
are bit numbers. Layouts are little endian, as virtio 1 has them; a legacy device has the same in the guest's
own byte order.

Promises: sizes are checked at import. Never holds behaviour.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure, Union
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvhost.abi._check import sized

# Feature bits (virtio 1.3, 5.1.3)
F_CSUM = 0
F_GUEST_CSUM = 1
F_CTRL_GUEST_OFFLOADS = 2
F_MTU = 3
F_MAC = 5
F_GSO = 6
F_GUEST_TSO4 = 7
F_GUEST_TSO6 = 8
F_GUEST_ECN = 9
F_GUEST_UFO = 10
F_HOST_TSO4 = 11
F_HOST_TSO6 = 12
F_HOST_ECN = 13
F_HOST_UFO = 14
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_CTRL_VLAN = 19
F_CTRL_RX_EXTRA = 20
F_GUEST_ANNOUNCE = 21
F_MQ = 22
F_CTRL_MAC_ADDR = 23
F_DEVICE_STATS = 50
F_VQ_NOTF_COAL = 52
F_NOTF_COAL = 53
F_GUEST_USO4 = 54
F_GUEST_USO6 = 55
F_HOST_USO = 56
F_HASH_REPORT = 57
F_GUEST_HDRLEN = 59
F_RSS = 60
F_RSC_EXT = 61
F_STANDBY = 62
F_SPEED_DUPLEX = 63
F_GUEST_UDP_TUNNEL_GSO = 65
F_GUEST_UDP_TUNNEL_GSO_CSUM = 66
F_HOST_UDP_TUNNEL_GSO = 67
F_HOST_UDP_TUNNEL_GSO_CSUM = 68

# Where the two GUEST_UDP_TUNNEL bits lie in CTRL_GUEST_OFFLOADS, whose mask is of 64 bits
F_GUEST_UDP_TUNNEL_GSO_MAPPED = 46
F_GUEST_UDP_TUNNEL_GSO_CSUM_MAPPED = 47

# Configuration space: status
S_LINK_UP = 1
S_ANNOUNCE = 2

# Frame header: flags
HDR_F_NEEDS_CSUM = 1
HDR_F_DATA_VALID = 2
HDR_F_RSC_INFO = 4
HDR_F_UDP_TUNNEL_CSUM = 8

# Frame header: gso_type
HDR_GSO_NONE = 0
HDR_GSO_TCPV4 = 1
HDR_GSO_UDP = 3
HDR_GSO_TCPV6 = 4
HDR_GSO_UDP_L4 = 5
HDR_GSO_UDP_TUNNEL_IPV4 = 0x20
HDR_GSO_UDP_TUNNEL_IPV6 = 0x40
HDR_GSO_UDP_TUNNEL = HDR_GSO_UDP_TUNNEL_IPV4 | HDR_GSO_UDP_TUNNEL_IPV6
HDR_GSO_ECN = 0x80

# Hash types (RSS and hash report), and what a header reports
RSS_HASH_TYPE_IPv4 = 1 << 0
RSS_HASH_TYPE_TCPv4 = 1 << 1
RSS_HASH_TYPE_UDPv4 = 1 << 2
RSS_HASH_TYPE_IPv6 = 1 << 3
RSS_HASH_TYPE_TCPv6 = 1 << 4
RSS_HASH_TYPE_UDPv6 = 1 << 5
RSS_HASH_TYPE_IP_EX = 1 << 6
RSS_HASH_TYPE_TCP_EX = 1 << 7
RSS_HASH_TYPE_UDP_EX = 1 << 8

HASH_REPORT_NONE = 0
HASH_REPORT_IPv4 = 1
HASH_REPORT_TCPv4 = 2
HASH_REPORT_UDPv4 = 3
HASH_REPORT_IPv6 = 4
HASH_REPORT_TCPv6 = 5
HASH_REPORT_UDPv6 = 6
HASH_REPORT_IPv6_EX = 7
HASH_REPORT_TCPv6_EX = 8
HASH_REPORT_UDPv6_EX = 9

# Control queue: acknowledgement, classes and their commands (virtio 1.3, 5.1.6.5)
OK = 0
ERR = 1

CTRL_RX = 0
CTRL_RX_PROMISC = 0
CTRL_RX_ALLMULTI = 1
CTRL_RX_ALLUNI = 2
CTRL_RX_NOMULTI = 3
CTRL_RX_NOUNI = 4
CTRL_RX_NOBCAST = 5

CTRL_MAC = 1
CTRL_MAC_TABLE_SET = 0
CTRL_MAC_ADDR_SET = 1

CTRL_VLAN = 2
CTRL_VLAN_ADD = 0
CTRL_VLAN_DEL = 1

CTRL_ANNOUNCE = 3
CTRL_ANNOUNCE_ACK = 0

CTRL_MQ = 4
CTRL_MQ_VQ_PAIRS_SET = 0
CTRL_MQ_RSS_CONFIG = 1
CTRL_MQ_HASH_CONFIG = 2
CTRL_MQ_VQ_PAIRS_MIN = 1
CTRL_MQ_VQ_PAIRS_MAX = 0x8000

CTRL_GUEST_OFFLOADS = 5
CTRL_GUEST_OFFLOADS_SET = 0

CTRL_NOTF_COAL = 6
CTRL_NOTF_COAL_TX_SET = 0
CTRL_NOTF_COAL_RX_SET = 1
CTRL_NOTF_COAL_VQ_SET = 2
CTRL_NOTF_COAL_VQ_GET = 3

CTRL_STATS = 8
CTRL_STATS_QUERY = 0
CTRL_STATS_GET = 1

# Statistics: what a device may have, as a mask, and what a reply is, as a number
STATS_TYPE_CVQ = 1 << 32
STATS_TYPE_RX_BASIC = 1 << 0
STATS_TYPE_RX_CSUM = 1 << 1
STATS_TYPE_RX_GSO = 1 << 2
STATS_TYPE_RX_SPEED = 1 << 3
STATS_TYPE_TX_BASIC = 1 << 16
STATS_TYPE_TX_CSUM = 1 << 17
STATS_TYPE_TX_GSO = 1 << 18
STATS_TYPE_TX_SPEED = 1 << 19

STATS_TYPE_REPLY_CVQ = 32
STATS_TYPE_REPLY_RX_BASIC = 0
STATS_TYPE_REPLY_RX_CSUM = 1
STATS_TYPE_REPLY_RX_GSO = 2
STATS_TYPE_REPLY_RX_SPEED = 3
STATS_TYPE_REPLY_TX_BASIC = 16
STATS_TYPE_REPLY_TX_CSUM = 17
STATS_TYPE_REPLY_TX_GSO = 18
STATS_TYPE_REPLY_TX_SPEED = 19


@sized(10)
class NetHdr(LittleEndianStructure):
    """The header before each frame of a legacy device without mergeable buffers."""

    _fields_ = (
        ("flags", u8),
        ("gso_type", u8),
        ("hdr_len", u16),
        ("gso_size", u16),
        ("csum_start", u16),
        ("csum_offset", u16),
    )


@sized(12)
class NetHdrMrgRxbuf(LittleEndianStructure):
    """The legacy header with mergeable buffers: the same bytes as `NetHdrV1`."""

    _fields_ = (("hdr", NetHdr), ("num_buffers", u16))


class _Csum(LittleEndianStructure):
    _fields_ = (("start", u16), ("offset", u16))


class _CsumWords(LittleEndianStructure):
    _fields_ = (("csum_start", u16), ("csum_offset", u16))


class _Rsc(LittleEndianStructure):
    _fields_ = (("segments", u16), ("dup_acks", u16))


class _CsumOrRsc(Union):
    _anonymous_ = ("words",)
    _fields_ = (("words", _CsumWords), ("csum", _Csum), ("rsc", _Rsc))


@sized(12)
class NetHdrV1(LittleEndianStructure):
    """The header before each frame once VERSION_1 is negotiated, with or without mergeable buffers."""

    _anonymous_ = ("csum_or_rsc",)
    _fields_ = (
        ("flags", u8),
        ("gso_type", u8),
        ("hdr_len", u16),
        ("gso_size", u16),
        ("csum_or_rsc", _CsumOrRsc),
        ("num_buffers", u16),
    )


@sized(20)
class NetHdrV1Hash(LittleEndianStructure):
    """The header with HASH_REPORT. (Linux 6.18's header splits `hash_value` into two halves of 16 bits.)"""

    _fields_ = (("hdr", NetHdrV1), ("hash_value", u32), ("hash_report", u16), ("padding", u16))


@sized(24)
class NetHdrV1HashTunnel(LittleEndianStructure):
    """The header with one of the UDP_TUNNEL_GSO features."""

    _fields_ = (("hash_hdr", NetHdrV1Hash), ("outer_th_offset", u16), ("inner_nh_offset", u16))


@sized(24)
class NetConfig(LittleEndianStructure):
    """The configuration space (virtio 1.3, 5.1.4); speed in Mbit/s, mtu in bytes."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("mac", u8 * 6),
        ("status", u16),
        ("max_virtqueue_pairs", u16),
        ("mtu", u16),
        ("speed", u32),
        ("duplex", u8),
        ("rss_max_key_size", u8),
        ("rss_max_indirection_table_length", u16),
        ("supported_hash_types", u32),
    )


@sized(2)
class NetCtrlHdr(LittleEndianStructure):
    """What a control command begins with; `class` is reached by getattr, for Python keeps the word."""

    _fields_ = (("class", u8), ("cmd", u8))


@sized(4)
class NetCtrlMac(LittleEndianStructure):
    """One MAC filter table; `macs` has `entries` addresses of 6 bytes."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("entries", u32), ("macs", u8 * 6 * 0))


@sized(2)
class NetCtrlMq(LittleEndianStructure):
    """How many queue pairs the driver uses from now on."""

    _fields_ = (("virtqueue_pairs", u16),)


@sized(8)
class NetCtrlCoalTx(LittleEndianStructure):
    """When to notify of sent frames: after so many, or so many microseconds."""

    _fields_ = (("tx_max_packets", u32), ("tx_usecs", u32))


@sized(8)
class NetCtrlCoalRx(LittleEndianStructure):
    """When to notify of received frames: after so many, or so many microseconds."""

    _fields_ = (("rx_max_packets", u32), ("rx_usecs", u32))


@sized(8)
class NetCtrlCoal(LittleEndianStructure):
    """The same for one queue."""

    _fields_ = (("max_packets", u32), ("max_usecs", u32))


@sized(12)
class NetCtrlCoalVq(LittleEndianStructure):
    """Which queue, and what for it."""

    _fields_ = (("vqn", u16), ("reserved", u16), ("coal", NetCtrlCoal))


@sized(8)
class NetRssConfigHdr(LittleEndianStructure):
    """RSS: up to the table, which has `indirection_table_mask` + 1 queues; a trailer follows."""

    _fields_ = (
        ("hash_types", u32),
        ("indirection_table_mask", u16),
        ("unclassified_queue", u16),
        ("indirection_table", u16 * 0),
    )


@sized(4)
class NetRssConfigTrailer(LittleEndianStructure):
    """RSS: after the table; `hash_key_data`, at byte 3, has `hash_key_length` bytes."""

    _fields_ = (("max_tx_vq", u16), ("hash_key_length", u8), ("hash_key_data", u8 * 0))


@sized(16)
class NetHashConfig(LittleEndianStructure):
    """HASH_REPORT: `hash_key_data`, at byte 13, has `hash_key_length` bytes."""

    _fields_ = (
        ("hash_types", u32),
        ("reserved", u16 * 4),
        ("hash_key_length", u8),
        ("hash_key_data", u8 * 0),
    )


@sized(8)
class NetStatsCapabilities(LittleEndianStructure):
    """Statistics that a device has: a mask of STATS_TYPE_*."""

    _fields_ = (("supported_stats_types", u64 * 1),)


class _QueueStats(LittleEndianStructure):
    _fields_ = (("vq_index", u16), ("reserved", u16 * 3), ("types_bitmap", u64 * 1))


@sized(16)
class NetCtrlQueueStats(LittleEndianStructure):
    """Which statistics of which queue a driver asks for."""

    _fields_ = (("stats", _QueueStats * 1),)


@sized(8)
class NetStatsReplyHdr(LittleEndianStructure):
    """Before each reply; `size` is the reply's with this header, in bytes."""

    _fields_ = (("type", u8), ("reserved", u8), ("vq_index", u16), ("reserved1", u16), ("size", u16))


def _counters(*names: str) -> tuple[tuple[str, type[NetStatsReplyHdr] | type[u64]], ...]:
    return (("hdr", NetStatsReplyHdr), *((name, u64) for name in names))


@sized(24)
class NetStatsCvq(LittleEndianStructure):
    """The control queue's statistics."""

    _fields_ = _counters("command_num", "ok_num")


@sized(56)
class NetStatsRxBasic(LittleEndianStructure):
    """A receive queue's statistics."""

    _fields_ = _counters(
        "rx_notifications", "rx_packets", "rx_bytes", "rx_interrupts", "rx_drops", "rx_drop_overruns"
    )


@sized(56)
class NetStatsTxBasic(LittleEndianStructure):
    """A transmit queue's statistics."""

    _fields_ = _counters(
        "tx_notifications", "tx_packets", "tx_bytes", "tx_interrupts", "tx_drops", "tx_drop_malformed"
    )


@sized(40)
class NetStatsRxCsum(LittleEndianStructure):
    """A receive queue's checksums."""

    _fields_ = _counters("rx_csum_valid", "rx_needs_csum", "rx_csum_none", "rx_csum_bad")


@sized(24)
class NetStatsTxCsum(LittleEndianStructure):
    """A transmit queue's checksums."""

    _fields_ = _counters("tx_csum_none", "tx_needs_csum")


@sized(40)
class NetStatsRxGso(LittleEndianStructure):
    """A receive queue's large frames."""

    _fields_ = _counters(
        "rx_gso_packets", "rx_gso_bytes", "rx_gso_packets_coalesced", "rx_gso_bytes_coalesced"
    )


@sized(56)
class NetStatsTxGso(LittleEndianStructure):
    """A transmit queue's large frames."""

    _fields_ = _counters(
        "tx_gso_packets",
        "tx_gso_bytes",
        "tx_gso_segments",
        "tx_gso_segments_bytes",
        "tx_gso_packets_noseg",
        "tx_gso_bytes_noseg",
    )


@sized(24)
class NetStatsRxSpeed(LittleEndianStructure):
    """What a receive queue's rate limit held back."""

    _fields_ = _counters("rx_ratelimit_packets", "rx_ratelimit_bytes")


@sized(24)
class NetStatsTxSpeed(LittleEndianStructure):
    """What a transmit queue's rate limit held back."""

    _fields_ = _counters("tx_ratelimit_packets", "tx_ratelimit_bytes")
