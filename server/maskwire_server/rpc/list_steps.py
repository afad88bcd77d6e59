"""Decodes and checks requests to ListSteps, and encodes pages of recorded steps."""

from __future__ import annotations

import base64

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.errors import invalid_field
from maskwire_server.rpc import encoding
from maskwire_server.step_listing import StepsPage, StepsRequest

_DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE = 100, 250


def read_list(request: pb.ListStepsRequest) -> StepsRequest:
    """Decode and check a ListSteps request. Raises Refused."""
    for field in ("lineage", "first_step", "last_step", "page_size"):
        if getattr(request, field) < 0:
            raise invalid_field(field, f"{field} must be at least 0, got {getattr(request, field)}")
    if request.last_step and request.last_step < request.first_step:
        raise invalid_field(
            "last_step",
            f"last_step must be at least first_step ({request.first_step}), or 0 for no limit, got "
            f"{request.last_step}",
        )
    lineage, first = request.lineage, request.first_step
    if request.page_token:
        lineage, first = _read_token(request)
    return StepsRequest(
        size=min(request.page_size or _DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE),
        first_step=first,
        last_step=request.last_step or None,
        lineage=lineage or None,
        run_id=request.run_id,
    )


def answer(page: StepsPage) -> pb.ListStepsResponse:
    """Encode a page of recorded steps as the answer to ListSteps."""
    return pb.ListStepsResponse(
        steps=[
            pb.RecordedStep(
                step=step.step,
                outcome=pb.StepOutcome.Name(step.outcome),
                losses=encoding.losses(step.losses),
                gradient_norm=step.gradient_norm,
                digest=step.digest,
            )
            for step in page.steps
        ],
        next_page_token="" if page.next_step is None else _token(page.lineage, page.next_step),
        run_id=page.run_id,
        lineage=page.lineage,
        parent_lineage=page.parent or 0,
        start_step=page.start_step,
        checkpoint=page.checkpoint or "",
    )


def _token(lineage: int, step: int) -> str:
    """The token of the page that begins at `step`. It names the lineage, as a restore may start another."""
    return base64.urlsafe_b64encode(f"{lineage} {step}".encode()).decode()


def _read_token(request: pb.ListStepsRequest) -> tuple[int, int]:
    try:
        text = base64.b64decode(request.page_token, altchars=b"-_", validate=True).decode("ascii")
        lineage, step = (int(number) for number in text.split(" "))
        valid = _token(lineage, step) == request.page_token and lineage > 0
        matches = request.lineage in (0, lineage) and request.first_step <= step <= (
            request.last_step or step
        )
    except ValueError:
        valid = matches = False
    if not (valid and matches):
        raise invalid_field(
            "page_token",
            "page_token must come from an earlier page of the same list, got "
            f"{request.page_token[:80]!r}; request the first page, without a token",
        )
    return lineage, step
