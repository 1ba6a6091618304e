"""A server that is too old is told of in one line; the driver's own limit is told as well as ours."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import bson
import pymongo.common
import pytest

from eventwatch.core.errors import ConfigError
from eventwatch.store.connection import open_store

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013


class OldServer:
    """Says of itself that it is that old, whatever it is asked."""

    def __init__(self, version: str, wire_version: int) -> None:
        self._answer = bson.encode(
            {
                "ok": 1, "ismaster": True, "isWritablePrimary": True, "maxWireVersion": wire_version,
                "minWireVersion": 0, "maxBsonObjectSize": 2**24, "maxMessageSizeBytes": 48_000_000,
                "maxWriteBatchSize": 100_000, "version": version,
                "versionArray": [*map(int, version.split(".")), 0],
            }
        )  # fmt: skip

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                length, number, _, kind = struct.unpack("<iiii", await reader.readexactly(16))
                await reader.readexactly(length - 16)
                head, code = (
                    (struct.pack("<iqii", 8, 0, 0, 1), OP_REPLY) if kind == OP_QUERY else (bytes(5), OP_MSG)
                )
                body = head + self._answer
                writer.write(struct.pack("<iiii", 16 + len(body), 1, number, code) + body)
        except asyncio.IncompleteReadError:
            writer.close()


@pytest.mark.parametrize(
    ("version", "wire_version", "line"),
    [
        ("3.6.23", 6, r"the database cannot be used: Server at \S+ reports wire version 6, but this version of "),
        ("4.2.6", 8, r"the database is MongoDB 4\.2\.6, eventwatch needs 4\.4 or later$"),
    ],
)
async def test_a_server_that_is_too_old_is_refused_in_one_line(
    version: str, wire_version: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As earlier drivers have it, which may be installed.
    monkeypatch.setattr(pymongo.common, "MIN_SUPPORTED_WIRE_VERSION", 8)
    server = await asyncio.start_server(OldServer(version, wire_version).serve, "127.0.0.1", 0)
    port: Any = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(ConfigError, match=line) as caught:
            async with open_store(f"mongodb://127.0.0.1:{port}/", "TSM"):
                pass
    assert "\n" not in str(caught.value)
