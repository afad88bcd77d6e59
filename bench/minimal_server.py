"""The least work of a server with durable steps: hash, two hand-overs, one insert and flush, one answer.

It has maskwire's threads and messages, and none of its guarantees: no sessions, ids, digest or limits, and
its write-ahead log is never merged. Its time is the floor of P2 and P3.

python -m bench.minimal_server DATABASE
"""

from __future__ import annotations

import hashlib
import queue
import sqlite3
import sys
import threading
from concurrent import futures
from typing import Any

import grpc

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

PRAGMAS = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=0")
"""The journal's settings."""
Step = tuple[bytes, bytes, threading.Lock]


def database(path: str) -> sqlite3.Connection:
    """An empty database for payloads, with the journal's settings."""
    opened = sqlite3.connect(path, isolation_level=None)
    for pragma in PRAGMAS:
        opened.execute(f"PRAGMA {pragma}")
    opened.execute("CREATE TABLE payloads (step INTEGER PRIMARY KEY, hash BLOB, payload BLOB)")
    return opened


class MinimalService(pb_grpc.TrainingServiceServicer):
    """Answers TrainStep once its batch is durable."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._queued: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._computed: queue.SimpleQueue[Step] = queue.SimpleQueue()
        for thread in (self._execute, self._commit):
            threading.Thread(target=thread, daemon=True).start()

    def TrainStep(self, request: pb.TrainStepRequest, context: Any) -> pb.TrainStepResponse:  # noqa: ARG002, N802
        """Hash, queue, wait."""
        data, durable = request.batch.data, threading.Lock()
        durable.acquire()
        self._queued.put((data, hashlib.sha256(data).digest(), durable))
        durable.acquire()
        return pb.TrainStepResponse(step=1)

    def _execute(self) -> None:
        while True:
            self._computed.put(self._queued.get())

    def _commit(self) -> None:
        opened = database(self._path)
        while True:
            steps = [self._computed.get()]
            while not self._computed.empty():
                steps.append(self._computed.get())
            opened.execute("BEGIN IMMEDIATE")
            for data, digest, _ in steps:
                opened.execute("INSERT INTO payloads (hash, payload) VALUES (?, ?)", (digest, data))
            opened.execute("COMMIT")
            for _, _, durable in steps:
                durable.release()


def main() -> None:
    """Serve until killed."""
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
    pb_grpc.add_TrainingServiceServicer_to_server(MinimalService(sys.argv[1]), server)  # type: ignore[no-untyped-call]
    print(f"listening on 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
