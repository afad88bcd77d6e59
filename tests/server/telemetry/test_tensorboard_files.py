"""Event files, read by TensorBoard's own reader."""

from __future__ import annotations

import errno
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwire.v1.values import Losses, ModelInfo, Outcome, TokenizerDescription
from maskwire_server.events import Evaluated, Generated, LineageOpened, StepCommitted
from maskwire_server.telemetry.sample_text import as_markdown, decoder

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
)
from maskwire_server.telemetry import tensorboard_files  # noqa: E402
from maskwire_server.telemetry.tensorboard_files import TensorBoardFiles  # noqa: E402

BYTES = ModelInfo(257, 256, None, 512, 1, "counting", True, False)


def writer(run_dir: Path) -> TensorBoardFiles:
    return TensorBoardFiles(run_dir, lambda: decoder(BYTES, run_dir / "tokenizer"))


def step(number: int, lineage: int = 1, **fields: Any) -> StepCommitted:
    losses = Losses(10.0 * lineage + number, 1.0, fields.pop("critic", None))
    chosen = {"gradient_norm": 0.5, "learning_rate": 1e-3, "time": 100.0 + number, **fields}
    return StepCommitted(
        run_id="run", lineage=lineage, step=number, outcome=Outcome.APPLIED, losses=losses, tokens=50,
        queue_seconds=0.1, compute_seconds=0.2, commit_seconds=0.3, **chosen,
    )  # fmt: skip


def evaluated(number: int, nats: float, tokens: int, **fields: Any) -> Evaluated:
    chosen = {"time": time.time(), "accuracy": 0.5, "chain_rule": False, "lineage": 1, **fields}
    return Evaluated(
        run_id="run", step=number, seconds=1.0, nats_per_token=nats, bits_per_byte=None, tokens=tokens,
        draws=16, **chosen,
    )  # fmt: skip


def read(run_dir: Path) -> Any:
    found = accumulators.EventAccumulator(str(run_dir / "tensorboard"), {"tensors": 0, "scalars": 0})
    return found.Reload()


def curve(found: Any, tag: str) -> list[tuple[int, float]]:
    """TensorBoard shows old scalars as tensors of one number too."""
    return [(event.step, event.value) for event in found.Scalars(tag)]


def write(run_dir: Path, *events: Any) -> None:
    files = writer(run_dir)
    for event in events:
        files.receive(event)
    files.close()


def test_losses_norm_rate_and_speed_are_curves(tmp_path: Path) -> None:
    steps = [step(number, critic=0.25) for number in (1, 2, 3)]
    write(tmp_path, LineageOpened(0.0, "run", 1, 0), *steps)
    found = read(tmp_path)
    assert curve(found, "loss/total") == [(1, 11.0), (2, 12.0), (3, 13.0)]
    assert curve(found, "loss/critic") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert curve(found, "optimizer/gradient_norm")[0] == (1, 0.5)
    assert curve(found, "optimizer/learning_rate")[0][1] == pytest.approx(1e-3)
    assert curve(found, "speed/tokens_per_second") == [(2, 50.0), (3, 50.0)], "50 tokens, each a second"
    assert curve(found, "speed/compute_seconds")[0][1] == pytest.approx(0.2)


def test_absent_losses_have_no_curve_and_a_loss_that_is_not_finite_is_a_point(tmp_path: Path) -> None:
    lost = StepCommitted(
        1.0, "run", 1, 1, Outcome.SKIPPED_NON_FINITE, Losses(math.nan), None, 0.0, 5, 0.0, 0.0, 0.0
    )
    write(tmp_path, LineageOpened(0.0, "run", 1, 0), lost)
    found = read(tmp_path)
    assert "loss/critic" not in found.Tags()["scalars"]
    assert "optimizer/gradient_norm" not in found.Tags()["scalars"]
    assert math.isnan(curve(found, "loss/total")[0][1])


def test_after_a_restart_and_after_a_restore_each_step_has_one_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    # Killed at step 5; step 5 was written, and lost with the disk's cache: the server starts again at step 4.
    write(tmp_path, LineageOpened(0.0, "run", 1, 0), *[step(n) for n in range(1, 6)])
    monkeypatch.setattr(tensorboard_files.time, "time", lambda: now + 10)
    write(tmp_path, LineageOpened(0.0, "run", 1, 4), *[step(n) for n in range(5, 9)],
          LineageOpened(0.0, "run", 2, 6), *[step(n, lineage=2) for n in (7, 8, 9)])  # fmt: skip
    assert curve(read(tmp_path), "loss/total") == [
        *[(n, 10.0 + n) for n in range(1, 7)], *[(n, 20.0 + n) for n in (7, 8, 9)],
    ]  # fmt: skip


def test_calls_that_evaluate_one_step_are_one_point_and_estimators_have_curves_of_their_own(
    tmp_path: Path,
) -> None:
    write(
        tmp_path, LineageOpened(0.0, "run", 1, 0),
        evaluated(3, 1.0, 10), evaluated(3, 4.0, 20, accuracy=0.8),
        evaluated(3, 5.0, 10, chain_rule=True), evaluated(7, 2.0, 10),
    )  # fmt: skip
    found = read(tmp_path)
    assert curve(found, "evaluation/nats_per_token") == [(3, 3.0), (7, 2.0)]
    assert curve(found, "evaluation/bits_per_token")[0][1] == pytest.approx(3.0 / math.log(2))
    assert curve(found, "evaluation/accuracy")[0][1] == pytest.approx((0.5 * 10 + 0.8 * 20) / 30)
    assert curve(found, "evaluation_chain_rule/nats_per_token") == [(3, 5.0)]


def test_an_evaluation_is_written_once_no_further_part_has_come_for_a_while(tmp_path: Path) -> None:
    files = writer(tmp_path)
    files.receive(LineageOpened(0.0, "run", 1, 0))
    files.receive(evaluated(3, 1.0, 10))
    assert files.idle(), "to be called again"
    assert files._evaluation is not None
    files._evaluation.time -= 60
    files._flushed -= 60
    assert not files.idle()
    assert curve(read(tmp_path), "evaluation/nats_per_token") == [(3, 1.0)]
    files.close()


def test_samples_are_text_that_cannot_end_its_block(tmp_path: Path) -> None:
    samples = (np.frombuffer(b"a\n```\n<b>\x1b[0m", np.uint8).astype(np.uint16), np.array([0xC3, 256, 104]))
    write(tmp_path, LineageOpened(0.0, "run", 1, 0),
          Generated(1.0, "run", 1, 4, 1.0, 2, 5, samples))  # fmt: skip
    (event,) = read(tmp_path).Tensors("samples")
    texts = [text.decode() for text in event.tensor_proto.string_val]
    assert event.step == 4
    assert texts == ["    a\n    ```\n    <b>�[0m", "    �h"]


def test_ids_of_a_tokenizer_are_decoded_with_the_run_s_file_and_shown_as_ids_without_one(
    tmp_path: Path,
) -> None:
    words = ModelInfo(300, 299, None, 512, 1, "counting", True, False)
    assert decoder(words, tmp_path)([5, 6]) == "5 6"
    assert decoder(None, tmp_path)([5, 6]) == "5 6"
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red": 5, "fish": 6}, unk_token="red"))
    made.save(str(tmp_path / "tokenizer.json"))
    assert decoder(words, tmp_path)([5, 6]) == "red fish"
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    for of_data, text in (
        (TokenizerDescription("sha256:", content), "red fish"),
        (TokenizerDescription("sha256:", b"no tokenizer"), "5 6"),
        (TokenizerDescription("bytes", document_end=(257,)), "\x05\x06"),
        (None, "5 6"),
    ):
        assert decoder(words, tmp_path, lambda found=of_data: found)([5, 6]) == text  # type: ignore[misc]
    assert as_markdown("x") == "    x"


def test_after_a_full_disk_the_curves_continue_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = writer(tmp_path)
    files.receive(LineageOpened(0.0, "run", 1, 0))
    files.receive(step(1))
    assert files._file is not None
    files._file.flush()

    def full(record: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files._file._records, "write", full)
    with pytest.raises(OSError, match="No space"):
        files.receive(step(2))
    with pytest.raises(OSError, match="a new file is tried"):
        files.receive(step(3))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "no file for each event that is lost"
    files._retry_at = 0.0
    files.receive(step(4))
    files.close()
    assert curve(read(tmp_path), "loss/total") == [(1, 11.0), (4, 14.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
