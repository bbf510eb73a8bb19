"""Every number and layout of pyvhost.abi against the C headers of this system."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from requirements import need_file, need_program
from unit.abi.headers import Answers, ask, declared, expectations

# What headers before a release need not have; from that release on it must be there.
APPEARED = {
    (6, 12): r"""
        VHOST_NEW_WORKER VHOST_FREE_WORKER VHOST_ATTACH_VRING_WORKER VHOST_GET_VRING_WORKER
        struct.vhost_worker_state struct.vhost_vring_worker
        VHOST_BACKEND_F_RESUME VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK VHOST_BACKEND_F_DESC_ASID
        VHOST_BACKEND_F_IOTLB_PERSIST
        VHOST_VDPA_RESUME VHOST_VDPA_GET_VRING_DESC_GROUP VHOST_VDPA_GET_VRING_SIZE
        VIRTIO_F_NOTIFICATION_DATA VIRTIO_F_NOTIF_CONFIG_DATA VIRTIO_F_ADMIN_VQ
        VIRTIO_NET_F_DEVICE_STATS VIRTIO_NET_F_VQ_NOTF_COAL VIRTIO_NET_F_GUEST_USO4 VIRTIO_NET_F_GUEST_USO6
        VIRTIO_NET_F_HOST_USO VIRTIO_NET_F_GUEST_HDRLEN VIRTIO_NET_HDR_GSO_UDP_L4
        VIRTIO_NET_CTRL_NOTF_COAL_VQ_\w+ struct.virtio_net_ctrl_coal struct.virtio_net_ctrl_coal_vq
        VIRTIO_NET_CTRL_STATS\w* VIRTIO_NET_STATS_\w+ struct.virtio_net_stats_\w+
        struct.virtio_net_ctrl_queue_stats
    """,
    (6, 18): r"""
        VHOST_GET_FEATURES_ARRAY VHOST_SET_FEATURES_ARRAY struct.vhost_features_array
        VHOST_SET_FORK_FROM_OWNER VHOST_GET_FORK_FROM_OWNER VHOST_FORK_OWNER_KTHREAD VHOST_FORK_OWNER_TASK
        VIRTIO_NET_F_(GUEST|HOST)_UDP_TUNNEL_GSO\w* VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM
        VIRTIO_NET_HDR_GSO_UDP_TUNNEL\w* struct.virtio_net_hdr_v1_hash_tunnel
        struct.virtio_net_rss_config_hdr struct.virtio_net_rss_config_trailer
    """,
    (7, 3): "VIRTIO_ID_SPI VIRTIO_ID_MEDIA",
}

# What no header has, or only an older or a newer one: from a standard's text, each with where.
OFTEN_ABSENT = r"""
    VHOST_F_DEVICE_IOTLB
    VIRTIO_QUEUE_SIZE_MAX
    VIRTIO_SCSI_EVT_ASYNC_\w+
    VIRTIO_VSOCK_F_STREAM VIRTIO_VSOCK_F_NO_IMPLIED_STREAM
    struct.virtio_net_hdr_v1_hash:hash_value
"""

# What the headers have and we leave out, and why.
LEFT_OUT = {
    "VIRTIO_TRANSPORT_F_END": "changes with every release",
    "sizeof(struct virtio_scsi_inhdr)": "lies in virtio_blk.h, and belongs to what virtio 1 has no more",
    "sizeof(struct virtio_net_rss_config)": "has a table in its middle; we have its two ends",
}

# The newest headers that somebody went through for what abi has not got yet
GONE_THROUGH = (7, 3)

# Everything that linux/vhost.h had in 2016, but VHOST_F_DEVICE_IOTLB, which it has lost since
SEED = """
    VHOST_VRING_F_LOG VHOST_ACCESS_RO VHOST_ACCESS_WO VHOST_ACCESS_RW VHOST_IOTLB_MISS VHOST_IOTLB_UPDATE
    VHOST_IOTLB_INVALIDATE VHOST_IOTLB_ACCESS_FAIL VHOST_IOTLB_MSG VHOST_PAGE_SIZE VHOST_VIRTIO
    VHOST_GET_FEATURES VHOST_SET_FEATURES VHOST_SET_OWNER VHOST_RESET_OWNER VHOST_SET_MEM_TABLE
    VHOST_SET_LOG_BASE VHOST_SET_LOG_FD VHOST_SET_VRING_NUM VHOST_SET_VRING_ADDR VHOST_SET_VRING_BASE
    VHOST_GET_VRING_BASE VHOST_VRING_LITTLE_ENDIAN VHOST_VRING_BIG_ENDIAN VHOST_SET_VRING_ENDIAN
    VHOST_GET_VRING_ENDIAN VHOST_SET_VRING_KICK VHOST_SET_VRING_CALL VHOST_SET_VRING_ERR
    VHOST_SET_VRING_BUSYLOOP_TIMEOUT VHOST_GET_VRING_BUSYLOOP_TIMEOUT VHOST_NET_SET_BACKEND VHOST_F_LOG_ALL
    VHOST_NET_F_VIRTIO_NET_HDR VHOST_SCSI_ABI_VERSION VHOST_SCSI_SET_ENDPOINT VHOST_SCSI_CLEAR_ENDPOINT
    VHOST_SCSI_GET_ABI_VERSION VHOST_SCSI_SET_EVENTS_MISSED VHOST_SCSI_GET_EVENTS_MISSED
    VHOST_VSOCK_SET_GUEST_CID VHOST_VSOCK_SET_RUNNING
    sizeof.vhost_vring_state sizeof.vhost_vring_file sizeof.vhost_vring_addr sizeof.vhost_iotlb_msg
    sizeof.vhost_msg sizeof.vhost_memory_region sizeof.vhost_memory sizeof.vhost_scsi_target
"""

EXPECTED = expectations()


@pytest.fixture(scope="module")
def gcc() -> str:
    need_file("/usr/include/stdio.h", package="libc6-dev")
    need_file("/usr/include/linux/vhost.h", package="linux-libc-dev")
    return need_program("gcc")


@pytest.fixture(scope="module")
def answers(gcc: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return ask(gcc, tmp_path_factory.mktemp("headers"), list(EXPECTED))


def test_values_sizes_and_offsets_are_those_of_c(answers: Answers) -> None:
    ours = {expression: EXPECTED[expression] for expression in answers.values}
    assert ours == answers.values


def test_everything_of_2016_was_compared(answers: Answers) -> None:
    seed = {re.sub(r"sizeof\.(\w+)", r"sizeof(struct \1)", name) for name in SEED.split()}
    assert len(seed) == 42 + 8  # macros, structures
    assert seed <= answers.values.keys()


def test_only_what_these_headers_are_too_old_for_was_left_out(
    answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    excusable = _patterns(OFTEN_ABSENT)
    for release, names in APPEARED.items():
        if answers.version < release:
            excusable += _patterns(names)
    inexcusable = {each for each in answers.unknown if not any(p.fullmatch(each) for p in excusable)}
    with capsys.disabled():
        headers = ".".join(map(str, answers.version))
        absent = (each for each in sorted(answers.unknown) if "->" not in each and "offsetof" not in each)
        print(f"\n{len(answers.values)} compared with the headers of Linux {headers}, which do not have:")
        print("  " + "\n  ".join(absent))
    assert inexcusable == set()


def test_the_headers_have_nothing_that_we_have_not(gcc: str, answers: Answers, tmp_path: Path) -> None:
    missing = declared(gcc, tmp_path) - EXPECTED.keys() - LEFT_OUT.keys()
    if answers.version > GONE_THROUGH:
        print(f"newer than Linux {GONE_THROUGH[0]}.{GONE_THROUGH[1]}, to be looked at:", *sorted(missing))
    else:
        assert missing == set()


def test_a_name_that_c_does_not_have_is_told_apart(gcc: str, tmp_path: Path) -> None:
    expressions = ["VHOST_VIRTIO", "VHOST_NO_SUCH", "sizeof(struct no_such)", "VIRTIO_VSOCK_OP_RW"]
    answers = ask(gcc, tmp_path, expressions)
    assert answers.values == {"VHOST_VIRTIO": 0xAF, "VIRTIO_VSOCK_OP_RW": 5}
    assert answers.unknown == {"VHOST_NO_SUCH", "sizeof(struct no_such)"}


def _patterns(names: str) -> list[re.Pattern[str]]:
    """`struct.X` stands for all that is asked about struct X, `struct.X:field` for that field."""
    patterns = []
    for name in names.split():
        if name.startswith("struct."):
            struct, _, field = name.removeprefix("struct.").partition(":")
            name = rf"\w+\(+struct {struct}\b.*" + (rf"\b{field}\)?" if field else "")
        patterns.append(re.compile(name))
    return patterns
