"""Clients in other languages, by reflection alone: Node's grpc-js, and buf's, which is Go's."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import ServerProcess

NODE_CLIENT = Path(__file__).with_name("foreign") / "client.js"
BATCH = {
    "data": base64.b64encode(bytes(i % 16 for i in range(64))).decode(),
    "shape": [4, 16],
    "dtype": "DATA_TYPE_UINT8",
}


def has_node_packages() -> bool:
    if shutil.which("node") is None:
        return False
    found = subprocess.run(
        ["node", "-e", "require('@grpc/grpc-js'); require('grpc-js-reflection-client')"],
        capture_output=True,
        check=False,
    )
    return found.returncode == 0


@pytest.mark.skipif(
    not has_node_packages(),
    reason="node, or @grpc/grpc-js and grpc-js-reflection-client on NODE_PATH, are not installed",
)
def test_node_trains_evaluates_saves_and_is_refused_with_the_right_codes(shared: ServerProcess) -> None:
    done = subprocess.run(
        ["node", str(NODE_CLIENT), shared.address], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first = found["steps"][0]
    assert found["steps"] == [first, first + 1, first + 2]
    assert all(losses["loss"] > 0 and "critic_loss" not in losses for losses in found["losses"])
    assert found["replayed"]
    assert found["same"]
    assert found["listed"] == [[first + n, found["losses"][n]["loss"]] for n in range(2)]
    assert found["more"]
    assert found["evaluation"] > 0
    assert (found["saved"], found["state"]) == ("from-node", "RUN_STATE_SERVING")
    assert found["chunks"] == ["model.safetensors", "manifest.json"]
    codes = {case: answer["code"] for case, answer in found["wrong"].items()}
    assert codes == {
        "mask_id": "INVALID_ARGUMENT",
        "size": "INVALID_ARGUMENT",
        "dtype": "INVALID_ARGUMENT",
        "payload": "INVALID_ARGUMENT",
        "taken": "ALREADY_EXISTS",
        "restore": "NOT_FOUND",
        "far": "OUT_OF_RANGE",
    }
    assert "reserve an id for it" in found["wrong"]["mask_id"]["details"]


def curl(server: ServerProcess, method: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The answer, or the code of the refusal."""
    done = subprocess.run(
        ["buf", "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-d", json.dumps(body),
         f"http://{server.address}/maskwire.v1.TrainingService/{method}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout or "{}"), ""
    error = json.loads(done.stderr)
    return error, error["code"]


@pytest.mark.skipif(shutil.which("buf") is None, reason="buf is not installed")
def test_buf_trains_evaluates_saves_and_is_refused_with_the_right_codes(shared: ServerProcess) -> None:
    trained, _ = curl(shared, "TrainStep", {"batch": BATCH})
    assert trained["losses"]["loss"] > 0
    assert "criticLoss" not in trained["losses"]
    evaluated, _ = curl(shared, "EvalLoss", {"batch": BATCH})
    assert evaluated["natsPerToken"] > 0
    assert int(evaluated["step"]) == int(trained["step"])
    listed, _ = curl(shared, "ListSteps", {"firstStep": trained["step"]})
    assert [(step["step"], step["digest"]) for step in listed["steps"]] == [
        (trained["step"], trained["digest"])
    ]
    saved, _ = curl(shared, "Checkpoint", {"name": "from-buf"})
    assert saved["checkpoint"]["name"] == "from-buf"
    for method, body, code in (
        ("TrainStep", {"batch": {**BATCH, "shape": [64]}}, "invalid_argument"),
        ("TrainStep", {"batch": BATCH, "onlyTrainCritic": True}, "invalid_argument"),
        ("TrainStep", {}, "invalid_argument"),
        ("EvalLoss", {"batch": BATCH, "draws": -1}, "invalid_argument"),
        ("Checkpoint", {"name": "from-buf"}, "already_exists"),
        ("Checkpoint", {"name": "Not A Name"}, "invalid_argument"),
        ("RestoreCheckpoint", {"name": "nothing"}, "not_found"),
        ("Generate", {"count": 0}, "invalid_argument"),
        ("ListSteps", {"firstStep": 2, "lastStep": 1}, "invalid_argument"),
        ("ListSteps", {"lineage": 99}, "failed_precondition"),
    ):
        answer, found = curl(shared, method, body)
        assert found == code, (method, body, answer)
