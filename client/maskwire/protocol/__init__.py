"""The client's protocol, without I/O: conversations, which the blocking and the asyncio driver perform."""
