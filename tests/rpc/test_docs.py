"""The code that the README and the docs show runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(
    serve: Callable[..., ServerProcess],
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "maskwire_server" in code:  # what a counter saves is no torch module
        server = serve(model__num_tokens="257", model__mask_id="256", model__max_seq_len="128")
    else:
        server = serve(seconds=0)
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(bytes(range(10, 250)) + bytes([number + 10]))
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("127.0.0.1:50051", server.address), "docs", "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out


def test_the_readmes_first_code_has_ten_lines() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) <= 10
