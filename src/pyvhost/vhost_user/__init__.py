"""The vhost-user protocol: its codec and both sides' sessions, without input or output, and a thin server.

`codec`, `payloads`, `frontend` and `describe` know the protocol alone and serve the driver side too;
`backend` turns messages into calls on a `vhost.Device`; `server` and `connection` are the sockets.

Promises: whatever a front end sends, it harms itself at most: its connection ends with a message that names
request, field and numbers, its descriptors are closed, the device is as new for the next one.
Never: knows a device type; touches guest memory.
"""
