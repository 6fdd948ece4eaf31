"""No test reaches anything but this machine: Python runs this file first, in every process that a test starts.

`helpers/network.py` puts the folder of this file on PYTHONPATH, and `conftest.py` looks after each test whether
something was tried: an error alone may be caught by the library that tried.
"""

import ipaddress
import os
import socket

_connect, _connect_ex, _sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
_getaddrinfo = socket.getaddrinfo


def _refuse(where):
    with open(os.environ["SWITCHKD_TRIED"], "a", encoding="utf-8") as file:
        file.write(f"{where}\n")
    raise ConnectionRefusedError(f"a test tried to reach {where}")


def _is_here(host):
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host in ("", "localhost", socket.gethostname())


def _checked(call):
    def checked(self, *args):
        address = args[-1]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(str(address[0])):
            _refuse(address)
        return call(self, *args)

    return checked


def _named(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and not _is_here(str(name)) and not str(name).replace(".", "").isdigit():
        _refuse(name)
    return _getaddrinfo(host, *args, **kwargs)


if "SWITCHKD_TRIED" in os.environ:
    socket.socket.connect = _checked(_connect)
    socket.socket.connect_ex = _checked(_connect_ex)
    socket.socket.sendto = _checked(_sendto)
    socket.getaddrinfo = _named
