"""Two ends of a wire: who asks for the world outside, and a port that leads to another port."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class RecordingProxy:
    """Stands where HTTPS_PROXY points to: notes which host is asked for, and refuses."""

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    connection.settimeout(5)
                    words = connection.recv(4096).decode(errors="replace").split()
                    self.hosts += words[1:2]
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def forwarded(listener: socket.socket, port: int) -> Iterator[None]:
    """Lead every connection to a listening socket on to a port of this machine."""

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        # Closing alone leaves a thread in `accept`, and with it the port.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
