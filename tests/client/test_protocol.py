"""Requests and retries without a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maskwire.batch import Batch
from maskwire.errors import ConflictError, DigestMismatchError, Failure, InvalidRequestError, UnavailableError
from maskwire.protocol.acknowledged import AcknowledgedHistory
from maskwire.protocol.codec import hash_of, step_request
from maskwire.protocol.effects import Call, Emit, Notify, Operation, Pause, Receive, Until
from maskwire.protocol.pending_step import PendingStep
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.sessionless_calls import Calls
from maskwire.protocol.token_batch import decode_batch, encode_batch
from maskwire.protocol.writer import Writer
from maskwire.results import StepResult
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion, step_digest


class TorchLike:
    """As much of a torch tensor as the client may rely on."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def detach(self) -> TorchLike:
        return self

    def cpu(self) -> TorchLike:
        return self

    def numpy(self) -> Any:
        return self.array


IDS = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    "tokens", [IDS, IDS.tolist(), TorchLike(IDS), IDS.astype(np.uint8), np.asfortranarray(IDS)]
)
def test_tokens_in_any_container_make_the_same_message(tokens: Any) -> None:
    batch = encode_batch(tokens)
    assert (batch.data, list(batch.shape), batch.dtype) == (
        bytes([1, 2, 3, 4, 5, 6]),
        [2, 3],
        pb.DATA_TYPE_UINT8,
    )


@pytest.mark.parametrize(
    ("top", "dtype", "size"),
    [
        (255, pb.DATA_TYPE_UINT8, 1),
        (256, pb.DATA_TYPE_UINT16, 2),
        (65_535, pb.DATA_TYPE_UINT16, 2),
        (65_536, pb.DATA_TYPE_INT32, 4),
        (2**31, pb.DATA_TYPE_INT64, 8),
        (-1, pb.DATA_TYPE_INT32, 4),
    ],
)
def test_the_smallest_type_that_holds_the_ids_is_sent(top: int, dtype: int, size: int) -> None:
    batch = encode_batch([[0, top]])
    assert (batch.dtype, len(batch.data)) == (dtype, 2 * size)


@pytest.mark.parametrize(
    ("num_tokens", "given", "sent"),
    [
        (256, "<i8", pb.DATA_TYPE_UINT8),
        (257, "<i8", pb.DATA_TYPE_UINT16),
        (257, "<i4", pb.DATA_TYPE_UINT16),
        (257, ">u2", pb.DATA_TYPE_UINT16),
        (257, "i1", pb.DATA_TYPE_UINT16),
        (257, "u1", pb.DATA_TYPE_UINT8),
        (65_536, "<u8", pb.DATA_TYPE_UINT16),
        (65_537, "<i2", pb.DATA_TYPE_INT32),
        (65_537, "<u2", pb.DATA_TYPE_UINT16),
        (65_537, "<i8", pb.DATA_TYPE_INT32),
    ],
)
def test_ids_are_sent_in_the_type_that_holds_the_vocabulary_or_a_narrower_one_that_they_have(
    num_tokens: int, given: str, sent: int
) -> None:
    batch = encode_batch(np.array([[3, 100]], dtype=given), num_tokens)
    assert batch.dtype == sent
    assert decode_batch(batch)[0].tolist() == [3, 100]  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [-1, 257, 65_536 + 5, 2**31, -(2**40)])
def test_an_id_outside_the_vocabulary_is_sent_as_it_is_and_not_narrowed(wrong: int) -> None:
    batch = encode_batch([[1, wrong]], 257)
    assert decode_batch(batch)[0].tolist() == [1, wrong]  # type: ignore[union-attr]
    assert encode_batch([[1, wrong]], 257) == encode_batch([[1, wrong]]), "the server refuses it by position"


@pytest.mark.parametrize(
    ("answered", "version"),
    [(0, DigestVersion(1, 257)), (1, DigestVersion(1, 257)), (2, DigestVersion(2, 257))],
)
def test_payloads_are_hashed_with_the_version_that_the_session_was_answered(
    answered: int, version: DigestVersion
) -> None:
    acknowledged = AcknowledgedHistory()
    acknowledged.open(pb.OpenSessionResponse(model=pb.ModelInfo(num_tokens=257), digest_version=answered))
    assert acknowledged.digest_version == version
    assert hash_of(step_request("r", IDS), version) == hash_of(step_request("r", IDS, 257), version)


def test_rows_that_differ_in_length_and_lengths_make_the_same_message() -> None:
    ragged = encode_batch([[1, 2, 3], [4]])
    padded = encode_batch([[1, 2, 3], [4, 99, 99]], lengths=[3, 1])
    assert ragged == padded
    assert (ragged.data, list(ragged.lengths), list(ragged.shape)) == (bytes([1, 2, 3, 4]), [3, 1], [2, 3])


def test_prompts_are_packed_row_major_lowest_bit_first() -> None:
    mask = np.zeros((2, 5), dtype=bool)
    mask[0, 1] = mask[1, 4] = True
    assert encode_batch(np.ones((2, 5), dtype=int), prompt_mask=mask).prompt_mask == bytes([0b10, 0b10])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: encode_batch([1, 2]), "two dimensions, .rows, columns., got 1"),
        (lambda: encode_batch([[0.5]]), "must be integers, got float64"),
        (lambda: encode_batch(IDS, lengths=[1]), r"one length per row \(2 rows\)"),
        (lambda: encode_batch([[1], [2, 3]], lengths=[1, 2]), "left out"),
        (lambda: encode_batch(IDS, prompt_mask=np.ones((2, 3))), "must have type bool"),
        (lambda: encode_batch(IDS, prompt_mask=np.ones((1, 3), dtype=bool)), "must have type bool"),
        (lambda: encode_batch(IDS, segment_ids=[[0, 0, 0], [0, 0, 2**31]]), "2.31 - 1, got 2147483648"),
        (lambda: encode_batch(IDS, segment_ids=[[0, 0, 0], [-1, 0, 0]]), "from 0 to 2.31 - 1, got -1"),
        (
            lambda: encode_batch((IDS, [3, 3])),
            r"row 0 must be a row of ids, got shape \[2, 3\]; .*maskwire\.Batch",
        ),
        (lambda: encode_batch([Batch(IDS), Batch(IDS)]), r"one maskwire\.Batch, got several"),
        (lambda: encode_batch(Batch(IDS), lengths=[1, 1]), r"lengths cannot be given with a Batch"),
    ],
)
def test_what_makes_no_batch_is_refused_before_it_travels(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_a_batch_makes_the_message_of_its_rows_and_what_describes_them() -> None:
    about: dict[str, Any] = {"lengths": [3, 2], "segment_ids": [[0, 0, 1], [0, 1, 0]], "prompt_mask": MASK}
    expected = encode_batch(IDS, 1000, **about)
    assert expected.segment_ids
    assert encode_batch(Batch(IDS, **about), 1000) == expected
    assert step_request("r", Batch(IDS, **about), 1000).batch == expected


MASK = np.array([[True, False, True], [False, True, False]])


@pytest.mark.parametrize(
    ("batches", "one", "about"),
    [
        ([IDS, np.array(IDS) + 300], [*IDS, *(np.array(IDS) + 300)], {}),
        ([[[1, 2], [3]], [[4, 5, 6]]], [[1, 2], [3], [4, 5, 6]], {}),
        ([[[1, 2, 3]], [[4]], [[5, 6]]], [[1, 2, 3], [4], [5, 6]], {}),
        (
            [Batch([[1, 2, 0], [3, 0, 0]], lengths=[2, 1]), [[4, 5, 6]]],
            [[1, 2, 0], [3, 0, 0], [4, 5, 6]],
            {"lengths": [2, 1, 3]},
        ),
        (
            [IDS, Batch(IDS, prompt_mask=MASK), [[7, 8]]],
            [*IDS, *IDS, [7, 8]],
            {"prompt_mask": [*np.zeros((2, 3), dtype=bool), *MASK, np.zeros(2, dtype=bool)]},
        ),
        (
            [IDS, Batch([[7, 8, 9]], segment_ids=[[0, 1, 1]])],
            [*IDS, [7, 8, 9]],
            {"segment_ids": [[0, 0, 0], [0, 0, 0], [0, 1, 1]]},
        ),
    ],
)
def test_several_batches_make_the_message_of_all_their_rows(
    batches: list[Any], one: list[Any], about: dict[str, Any]
) -> None:
    several = step_request("r", None, 1000, batches=batches, learning_rate=0.5)
    single = step_request("r", one, 1000, learning_rate=0.5, **about)
    assert several == single
    assert hash_of(several, DigestVersion(2, 1000)) == hash_of(single, DigestVersion(2, 1000))


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (None, {}, r"tokens is None: pass tokens, or batches=\[...\]"),
        (IDS, {"batches": [IDS]}, "takes tokens or batches, got both"),
        (None, {"batches": [IDS], "lengths": [1, 1]}, r"Batch\(rows, lengths=...\)"),
        (None, {"batches": []}, "at least one batch, got none"),
        (None, {"batches": [IDS, [[0.5]]]}, r"batches\[1\]: tokens must be integers, got float64"),
        (None, {"batches": [IDS, Batch(IDS, lengths=[9, 9])]}, r"batches\[1\]: lengths must be 1 to 3"),
        (None, {"batches": [IDS], "batch": IDS}, "did you mean 'batches'"),
    ],
)
def test_what_makes_no_step_of_several_batches_is_refused_before_it_travels(
    tokens: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        step_request("r", tokens, 1000, **options)


def test_unsigned_and_signed_ids_of_64_bits_stay_whole_numbers_side_by_side() -> None:
    rows = [np.array([1, 2**40], dtype=np.uint64), np.array([3], dtype=np.int64)]
    assert [row.tolist() for row in decode_batch(encode_batch(rows))] == [[1, 2**40], [3]]


def failing(**changes: Any) -> Failure:
    return Failure(**{"error": UnavailableError("no"), "retryable": True, **changes})


def test_waits_grow_to_a_cap_with_jitter_and_end() -> None:
    policy = RetryPolicy(retry_for=10)
    waits = [policy.wait(failing(), attempt, 0, jitter=lambda: 1.0) for attempt in range(10)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert policy.wait(failing(), 9, 0, jitter=lambda: 0.0) == 0.5
    assert policy.wait(failing(retry_after=0.7), 0, 0, jitter=lambda: 1.0) == 0.7
    assert policy.wait(failing(), 0, 10) is None
    assert policy.wait(failing(retryable=False), 0, 0) is None
    assert policy.wait(failing(), 5000, 0, jitter=lambda: 1.0) == 1.0


def answer(history: AcknowledgedHistory, request: pb.TrainStepRequest, step: int) -> pb.TrainStepResponse:
    digest = step_digest(history.digest, 1, step, hash_of(request, DigestVersion(1)), pb.STEP_OUTCOME_APPLIED)
    return pb.TrainStepResponse(step=step, digest=digest, outcome=pb.STEP_OUTCOME_APPLIED)


def test_the_acknowledged_history_follows_the_digest_chain_and_detects_a_difference() -> None:
    history = AcknowledgedHistory()
    assert history.history() is None
    session = pb.SessionRef(run_id="r", lineage=1, epoch=1)
    history.open(pb.OpenSessionResponse(session=session, step=4, durable_step=3, digest=b"d" * 32))
    request = pb.TrainStepRequest(batch=encode_batch(IDS), learning_rate=0.5)
    first = answer(history, request, 4)
    history.position = history.next_position(first, hash_of(request, DigestVersion(1)))
    assert (history.step, history.digest) == (4, first.digest)
    assert history.history() == pb.History(run_id="r", lineage=1, step=4, digest=first.digest)
    other = pb.TrainStepRequest(batch=encode_batch(IDS))
    with pytest.raises(DigestMismatchError, match="after step 5"):
        history.next_position(answer(history, other, 5), hash_of(request, DigestVersion(1)))
    with pytest.raises(DigestMismatchError, match="step 7, but the next step is 5"):
        history.next_position(answer(history, request, 7), hash_of(request, DigestVersion(1)))
    assert history.step == 4


@pytest.mark.parametrize("rows", [[[1, 2], [3, 70_000]], [[1], [2, 3], [4]]])
def test_rows_that_travel_come_back(rows: list[list[int]]) -> None:
    assert [row.tolist() for row in decode_batch(encode_batch(rows))] == rows


def state(step: int, *, done: bool = False) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=encode_batch([[step]]), unmasking_step=step, done=done)


def operation(*replies: Any, seconds: float = 0.0) -> tuple[list[Any], Any]:
    """What a generation does and gives when it meets these replies, and the error that ends it.

    Each reply comes after `seconds`.
    """
    now = 0.0
    asking = Calls("there", RetryPolicy(), lambda _: None, lambda: now)
    asked = asking.generate_steps(None, count=1)
    found: list[Any] = []
    left = list(replies)
    reply: Any = None
    try:
        while True:
            effect = asked.send(reply)
            if not isinstance(effect, Notify):
                found.append(effect.value.unmasking_step if isinstance(effect, Emit) else type(effect))
            reply = left.pop(0) if isinstance(effect, Receive) else None
            now += seconds if isinstance(effect, Receive) else 0.0
    except StopIteration:
        return found, None
    except UnavailableError as error:
        return found, str(error)


def test_a_generation_is_asked_for_again_only_while_nothing_came() -> None:
    lost = failing()
    assert operation(lost, lost, state(1), state(2, done=True)) == (
        [Receive, Pause, Receive, Pause, Receive, 1, Receive, 2],
        None,
    )
    found, error = operation(state(1), lost)
    assert (found, error) == ([Receive, 1, Receive], "no")
    found, error = operation(state(1), None)
    assert found == [Receive, 1, Receive]
    assert "ended the generation" in error


def test_a_generation_that_breaks_after_a_long_time_is_asked_for_once_more() -> None:
    """How long the server computed before it vanished does not count as time in which it did not answer."""
    lost = failing()
    assert operation(lost, state(1, done=True), seconds=1000.0) == ([Receive, Pause, Receive, 1], None)
    found, error = operation(lost, lost, state(1, done=True), seconds=1000.0)
    assert found == [Receive, Pause, Receive]
    assert "after 300 s: no" in error


@pytest.mark.parametrize(
    ("method", "seconds", "restarts"),
    [("Generate", 61.0, True), ("Generate", 20.0, False), ("EvalLoss", 1000.0, False)],
)
def test_only_a_generation_that_reached_the_server_restarts_the_limit(
    method: str, seconds: float, restarts: bool
) -> None:
    """An attempt of 20 s may have failed to connect."""
    assert RetryPolicy(retry_for=1.0).restarts_limit(method, seconds) is restarts


def train(writer: Writer, pending: PendingStep) -> Operation[StepResult]:
    """What a client does with a step."""
    yield from writer.enter(pending)
    return (yield from writer.finish(pending))


class Window:
    """A writer's steps in flight, whose answers come in the order in which a test gives them."""

    def __init__(self) -> None:
        self.writer = Writer("there", RetryPolicy(), lambda _: None, lambda: 0.0, "me", 8)
        opening = self.writer.open()
        next(opening)
        session = pb.SessionRef(run_id="r", lineage=1, epoch=1)
        limits = pb.Limits(window=8)
        with pytest.raises(StopIteration):
            opening.send(pb.OpenSessionResponse(session=session, digest=b"d" * 32, limits=limits))
        self.talks: list[Any] = []
        self.effects: list[Any] = []
        self.ended: list[Any] = []

    def hand_in(self, count: int) -> None:
        for _ in range(count):
            self.talks.append(train(self.writer, self.writer.new_step(IDS)))
            self.effects.append(None)
            self.ended.append(None)
            self._go_on(len(self.talks) - 1, None)

    def answer(self, index: int, reply: Any) -> None:
        assert isinstance(self.effects[index], Call)
        self._go_on(index, reply)

    def pass_time(self) -> None:
        """Pauses end, and waits whose condition holds."""
        moved = True
        while moved:
            moved = False
            for index, effect in enumerate(self.effects):
                if isinstance(effect, Pause | Notify) or (isinstance(effect, Until) and effect.holds()):
                    self._go_on(index, None)
                    moved = True

    def _go_on(self, index: int, reply: Any) -> None:
        try:
            self.effects[index] = self.talks[index].send(reply)
            while isinstance(self.effects[index], Until) and self.effects[index].holds():
                self.effects[index] = self.talks[index].send(None)
        except StopIteration as done:
            self.effects[index], self.ended[index] = None, done.value.step
        except ConflictError as error:
            self.effects[index], self.ended[index] = None, str(error)
        except InvalidRequestError:
            self.effects[index], self.ended[index] = None, "refused"

    @property
    def sent(self) -> list[int]:
        """The numbers under which the steps are on their way, 0 for those that are not."""
        return [effect.request.step if isinstance(effect, Call) else 0 for effect in self.effects]

    def applied(self, index: int) -> pb.TrainStepResponse:
        request = self.effects[index].request
        return answer(self.writer.acknowledged, request, request.step)


REFUSED = Failure(InvalidRequestError("the mask id", reason="INVALID_FIELD"), retryable=False)


def gap(expected: int) -> Failure:
    return Failure(
        ConflictError("ahead", reason="GAP", metadata={"expected_step": str(expected)}), retryable=False
    )


def test_no_step_is_sent_while_another_is_on_its_way_under_a_number_that_is_not_its_own() -> None:
    window = Window()
    window.hand_in(4)
    assert window.sent == [1, 2, 3, 4]
    window.answer(2, gap(2))  # before the refusal of step 2, which is late
    assert window.sent == [1, 2, 0, 4]
    window.answer(1, REFUSED)
    window.pass_time()
    window.hand_in(1)
    assert window.sent == [1, 0, 0, 4, 0], "the fourth one still has the number that is the fifth's"
    window.answer(3, gap(2))
    window.pass_time()
    assert window.sent == [1, 0, 2, 0, 0]


def test_what_is_behind_a_refused_step_is_sent_once_another_has_its_number() -> None:
    window = Window()
    window.hand_in(5)
    for index, reply in ((1, REFUSED), (3, REFUSED), (2, gap(2)), (4, gap(2))):
        window.answer(index, reply)
    window.pass_time()
    assert window.sent == [1, 0, 2, 0, 0]
    window.answer(0, window.applied(0))
    window.pass_time()
    assert window.sent == [0, 0, 2, 0, 0], "step 2 is in flight, and nothing after it"
    window.answer(2, REFUSED)
    window.pass_time()
    assert window.sent == [0, 0, 0, 0, 2]
    window.hand_in(2)
    assert window.sent == [0, 0, 0, 0, 2, 0, 0]
    window.answer(4, window.applied(4))
    window.pass_time()
    assert window.sent == [0, 0, 0, 0, 0, 3, 4]
    assert window.ended == [1, "refused", "refused", "refused", 2, None, None]


def test_a_gap_before_a_step_that_was_refused_meanwhile_is_no_other_history() -> None:
    window = Window()
    window.hand_in(4)
    window.answer(3, gap(3))
    window.answer(2, REFUSED)
    window.answer(1, REFUSED)
    window.pass_time()
    assert window.sent == [1, 0, 0, 2], "step 3 was in flight, though nothing is now"
