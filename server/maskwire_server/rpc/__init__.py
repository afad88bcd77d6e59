"""All that knows gRPC: the wire format, the service and its security."""
