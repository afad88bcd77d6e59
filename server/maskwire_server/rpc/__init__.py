"""The gRPC service: the server, access control, and the encoding of requests, answers and errors."""
