"""What is at the other end of a guest's connections: sockets of the host, siblings, and Python in this process."""
