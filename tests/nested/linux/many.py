"""Forks as often as it is told, and says what random numbers each child has, right after the fork.

Here nobody has used OpenSSL before, so that each child's gets its seed from the kernel there.
"""

import os
import ssl
import sys
import time
import uuid

ZERO = str(uuid.UUID(int=0))


def client_random():
    """The 32 bytes that a TLS client begins with."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.wrap_bio(incoming, outgoing, server_hostname="host").do_handshake()
    except ssl.SSLWantReadError:
        pass
    # Headers of the record (5 bytes) and of the handshake (4), the version (2).
    return outgoing.read()[11:43]


def numbers():
    random = os.urandom(32)
    with open("/proc/sys/kernel/random/uuid") as file:
        kernel = file.read().strip()
    return random.hex(), kernel, uuid.uuid4(), client_random().hex()


begin = time.monotonic()
children = []
for _ in range(int(sys.argv[1])):
    file = os.open("/uk/libukp/fork", os.O_RDWR)
    os.write(file, b"1")
    child = os.read(file, 100).decode().strip()
    if child == ZERO:
        with open("/dev/console", "w") as console:
            print("@random", *numbers(), file=console)
        os.execv("/.uk/ukp", ["ukp", "exit", "0"])
    os.close(file)
    with open(f"/uk/libukp/vm/{child}/wait", "r+b", buffering=0) as wait:
        wait.write(b"1")
        if wait.read(100) != b"0\n":
            sys.exit(f"{child} ended otherwise")
    children.append(child)
print(f"@took {time.monotonic() - begin:.1f}")
print("@random", *numbers())
print("@children", *children)
