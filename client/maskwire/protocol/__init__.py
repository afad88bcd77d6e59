"""The client's side of the protocol, without I/O: the blocking and the asyncio driver do the I/O."""
