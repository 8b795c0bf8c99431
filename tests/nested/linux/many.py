"""Forks as often as it is told, and says what random numbers each child has, right after the fork.

The first children have an OpenSSL that nobody has used before, so that it gets its seed from the kernel
there. Then it is used, as in a server that is warm, and each child tells it that it is another machine.
"""

import os
import ssl
import subprocess
import sys
import time
import uuid

ZERO = str(uuid.UUID(int=0))
UUIDGEN = "/usr/bin/uuidgen"
# Children before OpenSSL is used.
COLD = 2
# Children that live at the same time.
ALIVE = 3


def context_of_a_client():
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def client_random(context):
    """The 32 bytes that a TLS client begins with."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname="host").do_handshake()
    except ssl.SSLWantReadError:
        pass
    # Headers of the record (5 bytes) and of the handshake (4), the version (2).
    return outgoing.read()[11:43]


def kernel_uuid():
    if os.path.exists(UUIDGEN):
        return subprocess.run([UUIDGEN, "--random"], capture_output=True, check=True, text=True).stdout.strip()
    with open("/proc/sys/kernel/random/uuid") as file:
        return file.read().strip()


def numbers(context):
    """As the agent's documentation says: a generator in memory is told first."""
    random = os.urandom(32)
    if context:
        ssl.RAND_add(os.urandom(32), 32.0)
    else:
        context = context_of_a_client()
    return random.hex(), kernel_uuid(), uuid.uuid4(), client_random(context).hex()


def fork():
    file = os.open("/uk/libukp/fork", os.O_RDWR)
    os.write(file, b"1")
    child = os.read(file, 100).decode().strip()
    os.close(file)
    return child


def in_child(context):
    begin = time.monotonic()
    found = numbers(context)
    with open("/dev/console", "w") as console:
        print("@random", *found, file=console)
        print(f"@numbers {time.monotonic() - begin:.3f}", file=console)
    os.execv("/.uk/ukp", ["ukp", "exit", "0"])


def wait(child):
    with open(f"/uk/libukp/vm/{child}/wait", "r+b", buffering=0) as file:
        file.write(b"1")
        if file.read(100) != b"0\n":
            sys.exit(f"{child} ended otherwise")


begin = time.monotonic()
children, alive = [], []
forking = waiting = 0.0
context = None
for number in range(int(sys.argv[1])):
    if number == COLD:
        context = context_of_a_client()
        client_random(context)
    start = time.monotonic()
    child = fork()
    if child == ZERO:
        in_child(context)
    forking += time.monotonic() - start
    children.append(child)
    alive.append(child)
    start = time.monotonic()
    if len(alive) >= ALIVE:
        wait(alive.pop(0))
    waiting += time.monotonic() - start
for child in alive:
    wait(child)
print(f"@took {time.monotonic() - begin:.1f}")
print(f"@forking {forking:.1f}")
print(f"@waiting {waiting:.1f}")
print("@uuidgen", UUIDGEN if os.path.exists(UUIDGEN) else "none")
print("@random", *numbers(context))
print("@children", *children)
