"""The maskwire server: a resident masked-prediction model behind gRPC.

Three wings that never import one another, `rpc` (all that knows gRPC), `run` (order, and what is kept)
and `training` (all that knows torch), stand on `config`, `errors`, `batch` and `results`; `app` joins
them.
"""
