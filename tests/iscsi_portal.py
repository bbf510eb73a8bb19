"""A small iSCSI portal (RFC 7143) before a `pyvhost.scsi` target, for initiators that speak nothing else.

It is a tool of the tests: one TCP connection a session, no digests, no authentication, no error recovery, every
initiator believed. Each session is an I_T nexus; its name is the initiator's.
"""

from __future__ import annotations

import select
import socket
import struct

from pyvhost.host.poller import Poller
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.target import Response, Target
from pyvhost.scsi.task import Attribute, Outcome, Task

NAME = "iqn.2026-01.test:target"
#: Bytes that are asked for by one R2T, and sent in one Data-In.
BURST = 262144

_ATTRIBUTES = {
    0: Attribute.SIMPLE,
    1: Attribute.SIMPLE,
    2: Attribute.ORDERED,
    3: Attribute.HEAD_OF_QUEUE,
    4: Attribute.ACA,
}


class Command:
    """A SCSI command whose data may still be on its way."""

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.itt = header[16:20]
        self.lun = struct.unpack(">H", header[8:10])[0]
        length = struct.unpack(">I", header[20:24])[0]
        self.reads, self.writes = bool(header[1] & 0x40), bool(header[1] & 0x20)
        self.out = bytearray(length if self.writes else 0)
        self.into = bytearray(length if self.reads else 0)
        self.received = 0
        self.task: Task | None = None
        self.dropped = False
        #: The DataSN that the next Data-Out is to bear: they begin anew with each R2T.
        self.next_number = 0


class Session:
    """One initiator."""

    def __init__(self, portal: Portal, connection: socket.socket) -> None:
        self.portal = portal
        self.connection = connection
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.nexus: Nexus | None = None
        self.stat_sn = 1
        self.exp_cmd_sn = 0
        self.commands: dict[bytes, Command] = {}
        self.closing = False
        connection.setblocking(False)
        portal.poller.register(connection.fileno(), select.EPOLLIN, self.ready)

    # Bytes

    def ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            try:
                data = self.connection.recv(1 << 20)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self.incoming += data
            self.parse()

    def parse(self) -> None:
        while len(self.incoming) >= 48:
            extra, length = self.incoming[4] * 4, int.from_bytes(self.incoming[5:8], "big")
            whole = 48 + extra + length + (-length % 4)
            if len(self.incoming) < whole:
                return
            header = bytes(self.incoming[:48])
            data = bytes(self.incoming[48 + extra : 48 + extra + length])
            del self.incoming[:whole]
            self.pdu(header, data)
            if self.closing:
                return

    def send(self, header: bytearray, data: bytes = b"", *, status: bool = True) -> None:
        header[5:8] = len(data).to_bytes(3, "big")
        if status:
            header[24:28] = self.stat_sn.to_bytes(4, "big")
            self.stat_sn += 1
        header[28:32] = self.exp_cmd_sn.to_bytes(4, "big")
        header[32:36] = (self.exp_cmd_sn + 127 & 0xFFFFFFFF).to_bytes(4, "big")
        self.outgoing += header + data + bytes(-len(data) % 4)
        self.flush()

    def flush(self) -> None:
        if self.connection.fileno() < 0:
            return
        try:
            sent = self.connection.send(self.outgoing)
            del self.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.outgoing.clear()
        if self.outgoing:
            self.portal.poller.modify(self.connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
        elif self.closing:
            self.close()
        else:
            self.portal.poller.modify(self.connection.fileno(), select.EPOLLIN)

    def close(self) -> None:
        self.closing = True
        if self.connection.fileno() >= 0:
            self.portal.poller.unregister(self.connection.fileno())
            self.connection.close()
        for command in self.commands.values():
            command.dropped = True
        nexus, self.nexus = self.nexus, None
        if nexus is not None:
            self.portal.target.detach(nexus)

    # PDUs

    def pdu(self, header: bytes, data: bytes) -> None:
        opcode, immediate = header[0] & 0x3F, header[0] & 0x40
        number = int.from_bytes(header[24:28], "big")
        if opcode in (0x00, 0x01, 0x02, 0x04, 0x06) and not immediate:
            if number != self.exp_cmd_sn:
                return  # outside the window (RFC 7143, 4.2.2.1): dropped in silence
            self.exp_cmd_sn = self.exp_cmd_sn + 1 & 0xFFFFFFFF
        {
            0x00: self.nop,
            0x01: self.command,
            0x02: self.task_management,
            0x03: self.login,
            0x04: self.text,
            0x05: self.data_out,
            0x06: self.logout,
        }[opcode](header, data)

    def reply(self, opcode: int, request: bytes, flags: int = 0x80) -> bytearray:
        header = bytearray(48)
        header[0], header[1] = opcode, flags
        header[16:20] = request[16:20]
        return header

    def nop(self, header: bytes, data: bytes) -> None:
        if header[16:20] != b"\xff\xff\xff\xff":
            answer = self.reply(0x20, header)
            answer[20:24] = b"\xff\xff\xff\xff"
            self.send(answer, data)

    def login(self, header: bytes, data: bytes) -> None:
        asked = dict(pair.split("=", 1) for pair in data.decode().split("\0") if "=" in pair)
        if self.nexus is None and "InitiatorName" in asked:
            self.exp_cmd_sn = int.from_bytes(header[24:28], "big")
            self.nexus = Nexus(asked["InitiatorName"] + header[8:14].hex())
            self.portal.target.attach(self.nexus)
        said = {
            "HeaderDigest": "None",
            "DataDigest": "None",
            "InitialR2T": "Yes",
            "ImmediateData": "Yes",
            "MaxRecvDataSegmentLength": str(BURST),
            "MaxBurstLength": str(BURST),
            "FirstBurstLength": str(BURST),
            "MaxOutstandingR2T": "1",
            "DefaultTime2Wait": "2",
            "DefaultTime2Retain": "0",
            "ErrorRecoveryLevel": "0",
            "MaxConnections": "1",
            "DataPDUInOrder": "Yes",
            "DataSequenceInOrder": "Yes",
            "AuthMethod": "None",
        }
        stage, transit = header[1] >> 2 & 3, header[1] & 0x80
        text = "".join(f"{key}={said[key]}\0" for key in asked if key in said)
        if stage == 1 or not transit:
            text += "TargetPortalGroupTag=1\0"
        answer = self.reply(0x23, header, header[1] & 0x8F)
        answer[8:14] = header[8:14]
        answer[14:16] = (1).to_bytes(2, "big")
        self.send(answer, text.encode())

    def text(self, header: bytes, data: bytes) -> None:
        answer = self.reply(0x24, header)
        answer[20:24] = b"\xff\xff\xff\xff"
        listing = f"TargetName={NAME}\0TargetAddress=127.0.0.1:{self.portal.port},1\0"
        self.send(answer, listing.encode())

    def logout(self, header: bytes, data: bytes) -> None:
        self.send(self.reply(0x26, header))
        self.closing = True
        self.flush()

    def command(self, header: bytes, data: bytes) -> None:
        assert self.nexus is not None
        command = Command(header)
        self.commands[command.itt] = command
        command.out[: len(data)] = data[: len(command.out)]
        command.received = len(data)
        self.go_on(command)

    def go_on(self, command: Command) -> None:
        missing = len(command.out) - command.received
        if missing > 0:
            command.next_number = 0
            answer = self.reply(0x31, command.header)
            answer[8:16] = command.header[8:16]
            answer[20:24] = command.itt
            answer[40:44] = command.received.to_bytes(4, "big")
            answer[44:48] = min(missing, BURST).to_bytes(4, "big")
            answer[24:28] = self.stat_sn.to_bytes(4, "big")
            self.send(answer, status=False)
            return
        assert self.nexus is not None
        command.task = Task(
            command.header[32:48],
            self.nexus,
            lambda task: self.finished(command, task),
            tag=int.from_bytes(command.itt, "big"),
            attribute=_ATTRIBUTES.get(command.header[1] & 7, Attribute.SIMPLE),
            data_out=[memoryview(command.out)],
            data_in=[memoryview(command.into)],
        )
        self.portal.target.submit(command.task, command.lun & 0x3FFF if command.lun < 0x8000 else command.lun)

    def data_out(self, header: bytes, data: bytes) -> None:
        command = self.commands.get(header[16:20])
        if command is None:
            return
        number = int.from_bytes(header[36:40], "big")
        offset = int.from_bytes(header[40:44], "big")
        if number != command.next_number or offset != command.received:
            self.commands.pop(command.itt, None)
            self.close()  # a sequence error, and no recovery: the session ends
            return
        command.out[offset : offset + len(data)] = data
        command.received += len(data)
        command.next_number += 1
        if header[1] & 0x80:
            self.go_on(command)

    def finished(self, command: Command, task: Task) -> None:
        self.commands.pop(command.itt, None)
        if command.dropped or self.closing or task.outcome is not Outcome.STATUS:
            return
        sent = 0
        number = 0
        while sent < task.transferred_in:
            piece = bytes(command.into[sent : min(sent + BURST, task.transferred_in)])
            header = self.reply(0x25, command.header, 0x80 if sent + len(piece) == task.transferred_in else 0)
            header[20:24] = b"\xff\xff\xff\xff"
            header[36:40] = number.to_bytes(4, "big")
            header[40:44] = sent.to_bytes(4, "big")
            self.send(header, piece, status=False)
            sent += len(piece)
            number += 1
        header = self.reply(0x21, command.header)
        header[3] = task.status
        if task.residual:
            header[1] |= 0x04 if task.overflow else 0x02
            header[44:48] = task.residual.to_bytes(4, "big")
        header[36:40] = number.to_bytes(4, "big")
        sense = len(task.sense).to_bytes(2, "big") + task.sense if task.sense else b""
        self.send(header, sense)

    def task_management(self, header: bytes, data: bytes) -> None:
        assert self.nexus is not None
        target, nexus = self.portal.target, self.nexus
        lun = int.from_bytes(header[8:10], "big") & 0x3FFF
        function = header[1] & 0x7F

        def done(response: Response) -> None:
            answer = self.reply(0x22, header)
            answer[2] = {Response.INCORRECT_LOGICAL_UNIT_NUMBER: 2, Response.FUNCTION_REJECTED: 255}.get(
                response, 0
            )
            self.send(answer)

        if function == 1:
            command = self.commands.get(header[20:24])
            if command is None:
                answer = self.reply(0x22, header)
                answer[2] = 1  # there is no such task
                self.send(answer)
            elif command.task is None:
                del self.commands[command.itt]  # its data hadn't come yet
                done(Response.FUNCTION_COMPLETE)
            else:
                target.abort_task(nexus, lun, command.task.tag, done)
        elif function == 2:
            target.abort_task_set(nexus, lun, done)
        elif function == 3:
            target.clear_aca(nexus, lun, done)
        elif function == 4:
            target.clear_task_set(nexus, lun, done)
        elif function in (5, 6, 7):
            for number in list(self.commands):
                if self.commands[number].task is None:
                    del self.commands[number]
            target.lun_reset(lun, done)
        else:
            done(Response.FUNCTION_REJECTED)


class Portal:
    """Listens on a port of the loopback interface."""

    def __init__(self, poller: Poller, target: Target) -> None:
        self.poller = poller
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.sessions: list[Session] = []
        poller.register(self.listener.fileno(), select.EPOLLIN, self.accept)

    @property
    def url(self) -> str:
        """The target's LUN 0, as initiators that take URLs write it."""
        return f"iscsi://127.0.0.1:{self.port}/{NAME}/0"

    def accept(self, _events: int) -> None:
        connection, _ = self.listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sessions.append(Session(self, connection))

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self.poller.unregister(self.listener.fileno())
        self.listener.close()
