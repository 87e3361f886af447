"""A TCP proxy that spoils what a real server sends: cuts, resets, stalls, flips, or answers."""

import socket
import struct
import threading
from dataclasses import dataclass
from typing import Literal


@dataclass
class Spoil:
    """One thing to do when a connection has passed on `after` bytes since this was ordered."""

    kind: Literal["drop", "reset", "stall", "corrupt", "answer"]
    after: int = 0
    times: int = 1
    seconds: float = 30.0
    answer: bytes = b""  # sent in the place of the server's, for "answer"


class Proxy:
    """Passes on whatever comes to a port of its own."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._orders: list[Spoil] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.close()

    def order(self, *spoils: Spoil) -> None:
        """Do these, one after the other."""
        with self._lock:
            self._orders = list(spoils)

    @property
    def is_done(self) -> bool:
        """Whether everything that was ordered has been done."""
        with self._lock:
            return not self._orders

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        passed, order = 0, None
        try:
            while data := server.recv(1 << 16):
                with self._lock:
                    now = self._orders[0] if self._orders else None
                if now is not order:
                    passed, order = 0, now
                if now is not None and passed + len(data) > now.after and self._take(now):
                    order = None
                    data = self._spoil(now, data, now.after - passed, client)
                    passed = 0
                    if data is None:
                        return
                client.sendall(data)
                passed += len(data)
        except OSError:
            return
        finally:
            client.close()
            server.close()

    def _take(self, spoil: Spoil) -> bool:
        with self._lock:
            if not self._orders or self._orders[0] is not spoil:
                return False
            spoil.times -= 1
            if spoil.times <= 0:
                self._orders.pop(0)
            return True

    def _spoil(self, spoil: Spoil, data: bytes, place: int, client: socket.socket) -> bytes | None:
        if spoil.kind == "corrupt":
            flipped = bytearray(data)
            flipped[place] ^= 0x10
            return bytes(flipped)
        client.sendall(spoil.answer if spoil.kind == "answer" else data[:place])
        if spoil.kind == "stall":
            self._closing.wait(spoil.seconds)
        if spoil.kind == "reset":
            linger = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Wake the thread that reads from the client: the kernel keeps the connection until it does.
        client.shutdown(socket.SHUT_RD if spoil.kind == "reset" else socket.SHUT_RDWR)
        return None
