"""For node.sh: where on the network this machine is, seen from where all meet. Says `ADDRESS INTERFACE ,is_host=0|1`.

Waits until the meeting point has a name, and on other machines until it answers.
"""

import argparse
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

SAY_AFTER_S = 10.0
NOT_THERE = 69
"""Exit code that asks for another try, as that of ranks which lost others."""
ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): packets to it would leave by the default route."""

Found = TypeVar("Found")


def main() -> int:
    """Print the line, whose last word is an option of torchrun's rendezvous; none where all are on this machine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--interface", default="")
    parser.add_argument("--wait-s", type=float, default=600.0)
    arguments = parser.parse_args()
    interfaces = addresses_by_interface()
    if arguments.interface and arguments.interface not in interfaces:
        return fail(f"--interface is '{arguments.interface}', expected one of {', '.join(sorted(interfaces))}")
    deadline_s = time.monotonic() + arguments.wait_s
    place, tried = f"{arguments.host}:{arguments.port}", f"within {arguments.wait_s:g} s"
    meeting = patiently(lambda: resolve(arguments.host), f"a name server to know {arguments.host}", deadline_s)
    if meeting is None:
        return fail(
            f"{arguments.host} was not known {tried}; give --at an address, or a name that all machines know",
            NOT_THERE,
        )
    loopback, is_host = meeting.startswith("127."), any(meeting in found for found in interfaces.values())
    if not (loopback or is_host) and not patiently(
        lambda: answers(meeting, arguments.port), f"{place} ({meeting}) to answer", deadline_s
    ):
        return fail(
            f"{place} ({meeting}) did not answer {tried}; see that the same command runs on the machine with that "
            "address, and that no firewall stands between",
            NOT_THERE,
        )
    # /etc/hosts may give a machine's own name a loopback address, at which others cannot find it
    elsewhere = loopback and arguments.host not in ("localhost", meeting)
    own = source_address(ELSEWHERE if elsewhere else meeting)
    if arguments.interface:
        own = interfaces[arguments.interface][0]
    interface = next(name for name, found in interfaces.items() if own in found)
    print(own, interface, f",is_host={int(is_host or loopback)}" if elsewhere or not loopback else "")
    return 0


def addresses_by_interface() -> dict[str, list[str]]:
    """IPv4 addresses of this machine."""
    found = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def resolve(host: str) -> str | None:
    """IPv4 address of a name."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def source_address(address: str) -> str:
    """From where packets to an address would come."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return str(probe.getsockname()[0])


def answers(address: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except OSError:
        return False
    return True


def patiently(look: Callable[[], Found], what: str, deadline_s: float) -> Found:
    """What a look finds, repeated until it finds something or time is over."""
    began_s, said = time.monotonic(), False
    while not (found := look()) and time.monotonic() < deadline_s:
        if not said and time.monotonic() - began_s > SAY_AFTER_S:
            said = True
            print(f"waiting for {what}", file=sys.stderr, flush=True)
        time.sleep(0.5)
    return found


def fail(message: str, exit_code: int = 2) -> int:
    """One line, and the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
