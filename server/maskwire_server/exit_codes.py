"""The exit codes of `maskwire-server`."""

from __future__ import annotations

EXIT_CONFIG, EXIT_RUN_DIRECTORY, EXIT_INEXACT, EXIT_SLOW, EXIT_OUTPUT, EXIT_FENCED = 2, 3, 4, 5, 7, 9
EXIT_FAILURE, EXIT_HUNG, EXIT_DEVICE = 70, 71, 72
EXIT_CODES = {  # acknowledged steps are safe in each case
    0: "success; `serve` stopped cleanly",
    1: "`check`: the model does not fit in memory; `verify`: something is damaged; `serve`: it hung, and so "
    "did the thread that detects this; start the server again",
    EXIT_CONFIG: "the configuration, a certificate or a token file is invalid; stderr says what is wrong",
    EXIT_RUN_DIRECTORY: "the run directory cannot be used: another server uses it, it is damaged, or the run "
    "has another model, objective or seed than the configuration",
    EXIT_INEXACT: "a recomputed step gave another result than the recorded one",
    EXIT_SLOW: "stopped, but the running step took longer than `serve.drain_seconds`; start the server again",
    EXIT_OUTPUT: "the command finished, but its output could not be written to stdout (a full disk?)",
    EXIT_FENCED: "another server has taken the run over at the mirror's address; do not start this run "
    "directory again (docs/object-stores.md)",
    EXIT_FAILURE: "an unexpected error, which the log describes; start the server again",
    EXIT_HUNG: "a step or a read hung for `serve.step_timeout_seconds`, and the log has the stack of "
    "every thread; start the server again",
    EXIT_DEVICE: "the device failed, for example with a CUDA error that only a new process clears; start the "
    "server again, on another machine if it repeats",
}
