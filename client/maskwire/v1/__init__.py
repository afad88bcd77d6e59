"""The wire contract, version 1: stubs generated from `training_service.proto`, and its digest."""
