"""Real certificates and tokens for tests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trustme

TOKENS = {role: f"{role}-token-{'0123456789abcdef' * 2}" for role in ("read", "train", "admin")}
EXPIRED = "expired-token-0123456789abcdef"


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its key, as files."""

    cert: str
    key: str


class Authority:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *identities: str, expired: bool = False) -> Pair:
        until = datetime(2020, 1, 1, tzinfo=UTC) if expired else None
        made = self._authority.issue_cert(*identities, not_after=until)
        pair = Pair(str(self._folder / f"{name}.crt"), str(self._folder / f"{name}.key"))
        Path(pair.cert).write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        made.private_key_pem.write_to_path(pair.key)
        return pair


def token_files(folder: Path) -> dict[str, str]:
    """A file a role, and the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for role, token in TOKENS.items():
        (folder / role).write_text(f"# of role {role}\n\n{token}\n")
    with (folder / "admin").open("a") as file:
        file.write(f"{EXPIRED} 2020-01-31T00:00:00Z\n")
    return {f"serve__token_{role}_file": str(folder / role) for role in TOKENS}


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]
