"""Ends all ranks when one fails, and shows once what went wrong.

Every rank keeps a TCP connection to rank 0, read by a thread. A rank that raises sends its message through it, which is
a line for a mistake of the user or the state of the machine and a traceback for everything else; of a rank that is
killed, the system closes it. Rank 0 prints what it hears of first, tells the others, and ends. A thread can end the
process while the main thread waits in a collective for a rank that will never come.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Literal, NoReturn, Self

from torch import distributed as dist

from ejmp.train.distributed import Ranks, broadcast, host, start

GRACE = 1.0
"""Time in seconds that a failing rank waits for news of an earlier fault elsewhere, which may have caused its own."""
PATIENCE = 10.0
"""Time in seconds that a failing rank waits for rank 0 to show its message."""
FAULT, MISTAKE = 1, 2
"""Exit status after a fault of the program or the loss of a rank, and after bad input or a machine that is full."""
KEPT = "the last whole state stays, and the same command goes on from there"
"""What becomes of a run whose disk is full."""
CONNECT = 60.0
"""Time in seconds that the ranks have to connect."""


def in_words(error: BaseException) -> str | None:
    """Return what a fault of the user or of the machine comes to in one line; None if it is one of the program."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"{text}: {KEPT}"
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return text or None
    if isinstance(error, RuntimeError) and ("EADDRINUSE" in text or "already in use" in text):
        port = os.environ.get("MASTER_PORT", "")
        return f"port {port} is taken: give the launcher another one, --master_port (or set MASTER_PORT)"
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return f"the disk is full or cannot be written ({text.partition(chr(10))[0][:200]}): {KEPT}"
    return None


@contextlib.contextmanager
def session(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Ranks]:
    """Join the process group and leave it at the end; of several ranks, an exception in the body of one ends all.

    The exit status is then 2 for what `in_words` has words for, 1 for everything else. Environment variables, by which
    DeepSpeed learns of the ranks, are afterwards what they were.

    Args:
        device: device to compute on; "auto" takes CUDA if there is one and DS_ACCELERATOR is not cpu.

    Raises:
        ValueError: for a device that is not there, or if ranks are on several nodes and nothing says where rank 0 is.
    """
    environment = dict(os.environ)
    ranks = start(device)
    try:
        with contextlib.nullcontext() if ranks.world_size == 1 else Watch(ranks):
            yield ranks
    finally:  # also after a mistake, so that the same process can try again
        dist.destroy_process_group()
        groups = sys.modules.get("deepspeed.utils.groups")
        if groups is not None:  # else a later session of this process would get this one's groups
            vars(groups)["_WORLD_GROUP"] = None
        os.environ.clear()
        os.environ.update(environment)


class Watch:
    """Watches the other ranks while the body of a `with` statement runs; all ranks leave it together.

    Args:
        ranks: this process among all.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.lock = threading.Lock()
        self.all_done = threading.Event()
        if self.rank == 0:
            self.waiting = set(range(1, ranks.world_size))
            self.peers = self._accept()
            listeners = [threading.Thread(target=self._hear, args=item, daemon=True) for item in self.peers.items()]
        else:
            self.peers = {0: self._connect()}
            listeners = [threading.Thread(target=self._obey, daemon=True)]
        for listener in listeners:
            listener.start()

    def _accept(self) -> dict[int, socket.socket]:
        """Let every other rank connect, on rank 0; close connections of strangers, who do not know the token."""
        token, peers = secrets.token_hex(), {}
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096) as server:
            server.settimeout(CONNECT)
            broadcast((server.getsockname()[1], token))
            while len(peers) < len(self.waiting):
                peer, _ = server.accept()
                peer.settimeout(CONNECT)
                hello = json.loads(_read_line(peer) or "{}")
                if hello.get("token") != token:
                    peer.close()
                    continue
                peers[hello["rank"]] = _keep_alive(peer)
        return peers

    def _connect(self) -> socket.socket:
        port, token = broadcast(None)
        peer = socket.create_connection((host(), port), timeout=CONNECT)
        _send(peer, token=token, rank=self.rank)
        return _keep_alive(peer)

    def _hear(self, rank: int, peer: socket.socket) -> None:
        """Listen to a rank, on rank 0, until it is done; if it fails or falls silent, end all."""
        with contextlib.suppress(OSError):
            for line in peer.makefile():
                message = json.loads(line)
                if message["what"] == "failed":
                    self._end_all(rank, message["text"], message["status"])
                with self.lock:
                    self.waiting.discard(rank)
                    if not self.waiting:
                        self.all_done.set()
        if rank in self.waiting:
            self._end_all(rank, "ended without a message: killed, or its node is gone\n")

    def _obey(self) -> None:
        """Listen to rank 0, on any other rank; end when it says so or falls silent."""
        with contextlib.suppress(OSError):
            for line in self.peers[0].makefile():
                message = json.loads(line)
                if message["what"] == "failed":
                    _exit(message["status"])
                self.all_done.set()
                return
        if self.rank == 1:
            _show(0, "ended without a message: killed, or its node is gone\n")
        _exit()

    def _end_all(self, rank: int, text: str, status: int = FAULT) -> NoReturn:
        """Show a fault and end all ranks with an exit status, on rank 0."""
        self.lock.acquire()  # for good: threads with later faults wait here until the process ends
        _show(rank, text)
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                _send(peer, what="failed", status=status)
        _exit(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait for the other ranks; after an exception, send it to rank 0 and end."""
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._finish()
            return
        problem = in_words(error)
        text = "".join(traceback.format_exception(error)) if problem is None else f"{problem}\n"
        status = FAULT if problem is None else MISTAKE
        time.sleep(GRACE)
        if self.rank == 0:
            self._end_all(0, text, status)
        with contextlib.suppress(OSError):
            _send(self.peers[0], what="failed", text=text, status=status)
            time.sleep(PATIENCE)
        _show(self.rank, text)
        _exit(status)

    def _finish(self) -> None:
        if self.rank != 0:
            _send(self.peers[0], what="done")
        self.all_done.wait()
        if self.rank == 0:
            for peer in self.peers.values():
                with contextlib.suppress(OSError):
                    _send(peer, what="end")


def _keep_alive(peer: socket.socket) -> socket.socket:
    """Make the system notice within 20 s if the other node is gone, and return the connection."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peer


def _read_line(peer: socket.socket) -> str:
    """Read a line of up to 1000 bytes and not a byte more; return "" if the connection ends first."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000:
        byte = peer.recv(1)
        if not byte:
            return ""
        line += byte
    return line.decode()


def _send(peer: socket.socket, **message: object) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _show(rank: int, text: str) -> None:
    sys.stderr.write(f"rank {rank}: {text}")


def _exit(status: int = FAULT) -> NoReturn:
    """End this process at once, whatever its other threads are waiting for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
