"""What is at the other end of a network device: a tap, a raw socket, a switch, passt, a stream socket, or nothing.

Promises: here is the Python side alone, on the control thread: descriptors are opened, set up and closed, and a
number says to the compiled loop how to move frames. Never: touches a frame.
"""
