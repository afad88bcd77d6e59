"""The table of `maskwire status`: what the server counts, where there is something to see."""

from __future__ import annotations

from rich.console import Console

from maskwire.cli.display import status_table, to_json
from maskwire.protocol import status_codec
from maskwire.v1 import training_service_pb2 as pb


def shown(**fields: object) -> str:
    status = status_codec.read_status(pb.GetStatusResponse(state="RUN_STATE_SERVING", **fields))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(status_table(status))
    return captured.get()


def test_a_server_of_another_version_that_counts_nothing_has_no_such_rows() -> None:
    text = shown()
    for row in ("times", "loss", "refused", "lost", "not applied"):
        assert row not in text


def test_losses_times_refusals_and_lost_events_are_rows() -> None:
    text = shown(
        newest_step=pb.NewestStep(
            step=7, losses=pb.Losses(loss=1.25), gradient_norm=0.5, learning_rate=0.001
        ),
        step_seconds=pb.StepSeconds(queue_seconds=0.001, compute_seconds=0.1, commit_seconds=0.0015),
        steps_total={"APPLIED": 7, "POISON": 1},
        events_dropped={"tensorboard": 3, "opentelemetry": 0},
        refused_calls={"GAP": 2},
    )
    assert "step 7" in text
    assert "loss 1.2500, gradient norm 0.5, learning rate 0.001" in text
    assert "1.0 ms in the queue, 100.0 ms computed, 1.5 ms until durable" in text
    assert "1 POISON" in text
    assert "APPLIED" not in text
    assert "2 GAP" in text
    assert "3 tensorboard" in text
    assert "opentelemetry" not in text


def test_a_step_without_an_update_has_no_norm_in_the_json() -> None:
    answer = pb.GetStatusResponse(newest_step=pb.NewestStep(step=1, losses=pb.Losses(loss=float("nan"))))
    newest = to_json(status_codec.read_status(answer).figures)["newest_step"]
    assert newest == {
        "step": 1,
        "outcome": "UNKNOWN",
        "losses": {"loss": None, "generator_loss": None, "critic_loss": None},
        "gradient_norm": None,
        "learning_rate": 0.0,
    }
