"""The gRPC service: server, access control, requests, answers and errors on the wire."""
