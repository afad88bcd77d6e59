"""The command `maskwire`.

Exit codes: 0 done · 1 refused, or the server is not healthy · 2 wrong usage · 3 no answer from the
server · 4 another writer has the run · 5 server and client disagree about the history · 130 interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from maskwire import __version__
from maskwire.client import Trainer, connect
from maskwire.data import ByteData, Rows
from maskwire.errors import HistoryError, MaskwireError, SessionError, UnavailableError, read_failure
from maskwire.protocol import encode_batch as encode
from maskwire.protocol import new_id, read_checkpoint, read_eval, read_status
from maskwire.results import CheckpointInfo, EvalResult
from maskwire.show import checkpoint_table, eval_table, show, status_table
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

EXIT_REFUSED, EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_SESSION, EXIT_HISTORY, EXIT_INTERRUPTED = 1, 2, 3, 4, 5, 130
HEALTH_METHOD = "/grpc.health.v1.Health/Check"

app = typer.Typer(
    name="maskwire",
    help="Train a masked-token model on another machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 refused, 2 wrong usage, 3 no answer, 4 another writer, 5 histories differ, "
    "130 interrupted.",
)
checkpoint_app = typer.Typer(help="Save, list and restore checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
console = Console(stderr=True, highlight=False)

Target = Annotated[
    str, typer.Option("--target", "-t", envvar="MASKWIRE_TARGET", help="HOST:PORT of the server.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wait = Annotated[
    float, typer.Option("--retry-for", help="Seconds to wait for a server that does not answer.")
]
Paths = Annotated[list[Path], typer.Argument(help="Files or folders; each byte is a token.")]
Pattern = Annotated[str, typer.Option(help="Which files of a folder.")]
DEFAULT_TARGET = "127.0.0.1:50051"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train a masked-token model on another machine."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    paths: Paths,
    until_step: Annotated[int, typer.Option(help="Train until the run is at this step; an absolute number.")],
    target: Target = DEFAULT_TARGET,
    length: Annotated[int | None, typer.Option(help="Tokens a row; the model's longest by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the data's order.")] = 0,
    pattern: Pattern = "*",
    held_out: Annotated[float, typer.Option(help="Share of the files kept for evaluation.")] = 0.05,
    eval_every: Annotated[
        int | None, typer.Option(help="Evaluate on held-out files every so many steps.")
    ] = None,
    eval_rows: Annotated[int, typer.Option(help="Rows of an evaluation.")] = 64,
    checkpoint_every: Annotated[int | None, typer.Option(help="Save every so many steps.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="A file for one JSON line a step.")] = None,
    name: Annotated[
        str, typer.Option(help="This job: the same name takes its session over again.")
    ] = "maskwire-train",
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Take over from another writer, or from HALTED.")
    ] = False,
    window: Annotated[int, typer.Option(help="Steps in flight.")] = 4,
    retry_for: Wait = 300.0,
    as_json: Json = False,
) -> None:
    """Train on the bytes of files. Run again, it goes on where the run is."""
    with (
        _errors(),
        connect(
            target, name=name, takeover=takeover, window=window, retry_for=retry_for, on_wait=_say
        ) as trainer,
    ):
        data = ByteData(
            paths,
            length=length or trainer.model.max_seq_len,
            batch_size=batch_size,
            seed=seed,
            pattern=pattern,
        )
        evaluate = None
        if eval_every:
            data, apart = data.split(held_out)
            evaluate = _evaluation(apart, eval_rows)
        result = trainer.fit(
            data,
            until_step=until_step,
            evaluate=evaluate,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            metrics=metrics,
            progress=not as_json,
        )
        summary = {
            "step": trainer.step,
            "digest": trainer.digest.hex(),
            "loss": None if result.last is None else result.last.loss,
            "steps": result.step + 1 - result.first_step,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "interrupted": result.interrupted,
        }
        show(
            summary,
            as_json,
            lambda: (
                f"step {trainer.step}"
                + ("" if result.last is None else f"  loss {result.last.loss:.4f}")
                + f"  {result.tokens_per_second:,.0f} tokens/s  digest {trainer.digest.hex()[:16]}"
            ),
        )
        if result.interrupted:
            raise typer.Exit(EXIT_INTERRUPTED)


def _evaluation(data: ByteData, rows: int) -> Callable[[Trainer], EvalResult]:
    def evaluate(trainer: Trainer) -> EvalResult:
        chosen = data.spread(rows)
        return trainer.eval_loss(chosen, text_bytes=sum(len(row) for row in chosen))

    return evaluate


@app.command(name="eval")
def evaluate(
    paths: Paths,
    target: Target = DEFAULT_TARGET,
    length: Annotated[int | None, typer.Option(help="Tokens a row; the model's longest by default.")] = None,
    rows: Annotated[int, typer.Option(help="Rows, evenly spread over the data.")] = 64,
    draws: Annotated[int, typer.Option(help="Draws a row; 0 for the server's default.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    pattern: Pattern = "*",
    retry_for: Wait = 60.0,
    as_json: Json = False,
) -> None:
    """Estimate the negative ELBO of files' bytes, with its standard error. Changes nothing."""
    with _errors(), _calls(target, retry_for) as call:
        model = read_status(call("GetStatus", pb.GetStatusRequest())).model
        if model is None:
            raise UnavailableError("the server is building the model; ask again in a moment")
        chosen: Rows = ByteData(
            paths, length=length or model.max_seq_len, batch_size=1, pattern=pattern
        ).spread(rows)
        request = pb.EvalLossRequest(
            batch=encode(chosen),
            draws=draws,
            seed=seed,
            text_bytes=sum(len(row) for row in chosen),
        )
        show(found := read_eval(call("EvalLoss", request)), as_json, lambda: eval_table(found))


@checkpoint_app.command()
def save(
    name: Annotated[str, typer.Argument(help="[a-z0-9][a-z0-9_-]*; the server names it by default.")] = "",
    target: Target = DEFAULT_TARGET,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, kept with it; may be repeated.")] = None,
    retry_for: Wait = 60.0,
    as_json: Json = False,
) -> None:
    """Save the run's state."""
    labels = dict(text.partition("=")[::2] for text in label or [])
    with _errors(), _calls(target, retry_for) as call:
        request = pb.CheckpointRequest(request_id=new_id(), name=name, labels=labels)
        info = read_checkpoint(call("Checkpoint", request).checkpoint)
        show(info, as_json, lambda: f"{info.name}  step {info.step}  {info.size_bytes / 1e6:.1f} MB")


@checkpoint_app.command(name="list")
def list_checkpoints(target: Target = DEFAULT_TARGET, retry_for: Wait = 60.0, as_json: Json = False) -> None:
    """List the run's checkpoints, newest first."""
    with _errors(), _calls(target, retry_for) as call:
        found: list[CheckpointInfo] = []
        token = ""
        while True:
            page = call("ListCheckpoints", pb.ListCheckpointsRequest(page_token=token))
            found += [read_checkpoint(info) for info in page.checkpoints]
            token = page.next_page_token
            if not token:
                break
        show(found, as_json, lambda: checkpoint_table(found))


@checkpoint_app.command()
def restore(
    name: Annotated[str, typer.Argument(help="The checkpoint to go back to.")],
    target: Target = DEFAULT_TARGET,
    expected_step: Annotated[int | None, typer.Option(help="Refuse unless the run is at this step.")] = None,
    retry_for: Wait = 60.0,
    as_json: Json = False,
) -> None:
    """Go back to a checkpoint, on a new lineage; the run's writer must connect again."""
    with _errors(), _calls(target, retry_for) as call:
        request = pb.RestoreCheckpointRequest(request_id=new_id(), name=name, expected_step=expected_step)
        answer = call("RestoreCheckpoint", request)
        shown = {"lineage": answer.lineage, "step": answer.step, "digest": answer.digest.hex()}
        show(shown, as_json, lambda: f"lineage {answer.lineage} goes on from step {answer.step}")


@app.command()
def status(
    target: Target = DEFAULT_TARGET,
    watch: Annotated[bool, typer.Option("--watch", help="Ask every second.")] = False,
    retry_for: Wait = 5.0,
    as_json: Json = False,
) -> None:
    """Is the run stuck or working?"""
    with _errors(), _calls(target, retry_for) as call:
        while True:
            found = read_status(call("GetStatus", pb.GetStatusRequest()))
            show(found, as_json, lambda found=found: status_table(found))  # type: ignore[misc]
            if not watch:
                return
            time.sleep(1)


@app.command()
def health(
    target: Target = DEFAULT_TARGET,
    service: Annotated[str, typer.Option(help="'' for readiness, 'liveness' for liveness.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Exit 0 when the server is serving, 1 when it is not, 3 when it does not answer."""
    with _errors(), grpc.insecure_channel(target) as channel:
        # grpc.health.v1 in its own two bytes, so that the client needs no further package: the
        # request's field 1 is the service, the answer's field 1 the status, 1 for SERVING.
        call: Any = channel.unary_unary(HEALTH_METHOD)
        name = service.encode()
        request = b"\x0a" + bytes([len(name)]) + name if name else b""
        try:
            serving = call(request, timeout=timeout, wait_for_ready=True) == b"\x08\x01"
        except grpc.RpcError as error:
            raise read_failure(error).error from None
    show({"serving": serving}, as_json, lambda: "serving" if serving else "not serving")
    if not serving:
        raise typer.Exit(EXIT_REFUSED)


@contextmanager
def _calls(target: str, retry_for: float) -> Iterator[Callable[[str, Any], Any]]:
    """Calls that need no session, asked again until `retry_for` seconds have passed."""
    with grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = pb_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]

        def call(method: str, request: Any) -> Any:
            deadline = time.monotonic() + retry_for
            while True:
                try:
                    return getattr(stub, method)(request, timeout=max(60.0, retry_for))
                except grpc.RpcError as error:
                    failure = read_failure(error)
                if not failure.retryable or time.monotonic() >= deadline:
                    raise failure.error from None
                time.sleep(min(1.0, failure.retry_after or 0.5))

        yield call


@contextmanager
def _errors() -> Iterator[None]:
    """Errors as one line that says what to do, and the exit code."""
    try:
        yield
    except UnavailableError as error:
        _fail(EXIT_UNAVAILABLE, f"{error}\nis the server running, and the address right?")
    except SessionError as error:
        _fail(EXIT_SESSION, error)
    except HistoryError as error:
        _fail(EXIT_HISTORY, error)
    except MaskwireError as error:
        _fail(EXIT_REFUSED, error)
    except (ValueError, TypeError, OSError) as error:
        _fail(EXIT_USAGE, error)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _fail(code: int, error: object) -> None:
    _say(f"maskwire: {error}")
    raise typer.Exit(code)


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point."""
    app()
