"""Find the address and interface of this machine for node.sh. Prints `ADDRESS INTERFACE ,is_host=0|1`.

Waits until the name of the rendezvous host resolves and, on other machines, until the host accepts connections.
"""

import argparse
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

MESSAGE_AFTER_S = 10.0
UNREACHABLE = 69
"""Exit code that asks the scheduler to try again, equal to that of ranks that lost other ranks."""
REMOTE_ADDRESS = "192.0.2.1"
"""A documentation address that no machine has (RFC 5737): packets to it would use the default route."""

Result = TypeVar("Result")


def main() -> int:
    """Print the line. The option `is_host` of torchrun's rendezvous is left out for a single machine."""
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
    host, waited = f"{arguments.host}:{arguments.port}", f"within {arguments.wait_s:g} s"
    host_address = retry(lambda: resolve(arguments.host), f"the name {arguments.host} to resolve", deadline_s)
    if host_address is None:
        return fail(
            f"{arguments.host} did not resolve {waited}; set --at to an address, or to a name that all machines "
            "can resolve",
            UNREACHABLE,
        )
    is_loopback = host_address.startswith("127.")
    is_host = any(host_address in addresses for addresses in interfaces.values())
    if not (is_loopback or is_host) and not retry(
        lambda: accepts_connections(host_address, arguments.port), f"{host} ({host_address}) to answer", deadline_s
    ):
        return fail(
            f"{host} ({host_address}) did not answer {waited}; check that the same command runs on the machine with "
            "that address, and that no firewall blocks the port",
            UNREACHABLE,
        )
    # /etc/hosts may map a machine's own name to a loopback address, which other machines cannot reach
    is_own_name = is_loopback and arguments.host not in ("localhost", host_address)
    own = source_address(REMOTE_ADDRESS if is_own_name else host_address)
    if arguments.interface:
        own = interfaces[arguments.interface][0]
    interface = next(name for name, addresses in interfaces.items() if own in addresses)
    print(own, interface, f",is_host={int(is_host or is_loopback)}" if is_own_name or not is_loopback else "")
    return 0


def addresses_by_interface() -> dict[str, list[str]]:
    """Return the IPv4 addresses of this machine, by interface."""
    found = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def resolve(host: str) -> str | None:
    """Return the IPv4 address of a name, or None if the name does not resolve."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def source_address(address: str) -> str:
    """Return the address of this machine from which packets to `address` would be sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends no packet
        return str(probe.getsockname()[0])


def accepts_connections(address: str, port: int) -> bool:
    """Return True if a program listens on this port."""
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except OSError:
        return False
    return True


def retry(attempt: Callable[[], Result], awaited: str, deadline_s: float) -> Result:
    """Repeat `attempt` until its result is true or the deadline has passed, and return the last result."""
    began_s, printed = time.monotonic(), False
    while not (result := attempt()) and time.monotonic() < deadline_s:
        if not printed and time.monotonic() - began_s > MESSAGE_AFTER_S:
            printed = True
            print(f"waiting for {awaited}", file=sys.stderr, flush=True)
        time.sleep(0.5)
    return result


def fail(message: str, exit_code: int = 2) -> int:
    """Print the error on one line, and return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
