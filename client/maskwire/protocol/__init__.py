"""The client's protocol, without I/O: operations, which the blocking and the asyncio driver perform."""
