"""Version 1 of the protocol: the code generated from `training_service.proto`, and the history digest."""
