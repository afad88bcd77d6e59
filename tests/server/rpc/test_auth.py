"""Token files and certificates, and the role that each method requires."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError, Refused
from maskwire_server.rpc import auth
from maskwire_server.rpc.auth import Role, TokenInterceptor
from maskwire_server.rpc.credential_files import CredentialFiles

GOOD = "0123456789abcdef-good"
OTHER = "fedcba9876543210-other"


def config(**files: Path) -> ServeConfig:
    return ServeConfig(**files)  # type: ignore[arg-type]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_token_files_no_token_is_required() -> None:
    assert auth.read_tokens(ServeConfig()) == []
    assert CredentialFiles(ServeConfig()).interceptor is None


def test_a_token_file_contains_tokens_expiry_times_and_comments(tmp_path: Path) -> None:
    text = f"# first\n{GOOD}   # of the trainer\n\nanother-0123456789 2031-01-01T00:00:00+01:00\n"
    first, second = auth.read_tokens(config(token_train_file=write(tmp_path / "t", text)))
    assert (first.role, first.expires) == (Role.TRAIN, None)
    assert second.expires == 1924988400.0  # 2030-12-31T23:00:00Z


def test_a_token_is_rejected_from_its_expiry_time_on(tmp_path: Path) -> None:
    path = write(tmp_path / "t", f"{GOOD} 2031-01-01T00:00:00Z\n")
    tokens = auth._read_tokens("serve.token_read_file", path, Role.READ)
    now = 1924991999.0  # a second before
    interceptor = TokenInterceptor(tokens, Role.ADMIN, clock=lambda: now)
    details: Any = SimpleNamespace(
        method="/maskwire.v1.TrainingService/GetStatus",
        invocation_metadata=[("authorization", f"bearer {GOOD}")],
    )
    assert interceptor.intercept_service(lambda _: None, details) is None, "let through"
    now += 1
    with pytest.raises(Refused, match="expired"):
        interceptor._check(details.method, details.invocation_metadata)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no token"),
        ("# nothing\n", "contains no token"),
        ("short\n", "line 1: a token must have at least 16 characters, all of them ASCII, got 5 characters"),
        (f"\n{GOOD} tomorrow\n", "line 2: only an expiry time, such as 2027-01-31T00:00:00Z, may follow"),
        (f"{GOOD} {OTHER}\n", "line 1: only an expiry time"),
        (f"{GOOD}\n{GOOD}\n", "is listed twice"),
    ],
)
def test_an_invalid_token_file_is_named_and_none_of_its_tokens(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        auth.read_tokens(config(token_read_file=write(tmp_path / "tokens", text)))
    assert "serve.token_read_file" in str(raised.value)
    assert GOOD not in str(raised.value)
    assert OTHER not in str(raised.value)
    assert "short" not in str(raised.value)


def test_a_token_in_two_files_and_a_missing_file_are_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "t", GOOD)
    with pytest.raises(ConfigError, match="is listed twice, in this or another token file"):
        auth.read_tokens(config(token_read_file=path, token_admin_file=path))
    with pytest.raises(ConfigError, match="cannot be read"):
        auth.read_tokens(config(token_read_file=tmp_path / "none"))


def test_the_role_for_downloads_is_configurable(tmp_path: Path) -> None:
    path = write(tmp_path / "t", GOOD)
    settings = ServeConfig(token_read_file=path, download_role="read")
    interceptor = CredentialFiles(settings).interceptor
    assert interceptor is not None
    sent = [("authorization", f"Bearer {GOOD}")]
    interceptor._check("/maskwire.v1.TrainingService/DownloadCheckpoint", sent)
    with pytest.raises(Refused, match="requires a token of role admin, but this token has role read"):
        interceptor._check("/maskwire.v1.TrainingService/RestoreCheckpoint", sent)


def test_the_deployment_page_lists_the_required_role_of_every_method() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "deployment.md").read_text()
    table = re.findall(r"^\| (read|train|admin) \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    documented = [(rpc, role) for role, rpcs in table for rpc in rpcs.strip().split(", ")]
    rpcs = [method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods]
    assert sorted(rpc for rpc, _ in documented) == sorted(rpcs), "each in one place"
    assert set(auth.REQUIRED_ROLES) == set(rpcs), "a method that is not listed would require the role admin"
    assert {rpc: auth.REQUIRED_ROLES[rpc].name.lower() for rpc in rpcs} == dict(documented)
    assert (
        "`serve.download_role`" in dict(re.findall(r"^\| (\w+) \| ([^|]+) \|", page, re.MULTILINE))["admin"]
    )
    assert ServeConfig().download_role == dict(documented)["DownloadCheckpoint"]


def test_invalid_certificates_are_named(tmp_path: Path) -> None:
    import trustme

    authority = trustme.CA()
    cert, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    cert.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    cert.private_key_pem.write_to_path(str(tmp_path / "key"))
    other.private_key_pem.write_to_path(str(tmp_path / "other"))
    (tmp_path / "junk").write_text("no certificate")

    def settings(**files: str) -> ServeConfig:
        named: Any = {name: tmp_path / file for name, file in files.items()}
        return ServeConfig(**named)

    assert auth.read_certificates(settings(tls_certificate="crt", tls_key="key")) is not None
    assert auth.read_certificates(ServeConfig()) is None
    for files, words in (
        ({"tls_certificate": "none", "tls_key": "key"}, "tls_certificate: .*cannot be read"),
        ({"tls_certificate": "crt", "tls_key": "other"}, "certificate chain and its private key"),
        ({"tls_certificate": "junk", "tls_key": "key"}, "certificate chain and its private key"),
        ({"tls_certificate": "crt", "tls_key": "key", "tls_client_ca": "junk"}, "tls_client_ca: .*PEM"),
    ):
        with pytest.raises(ConfigError, match=words):
            auth.read_certificates(settings(**files))


class Followed:
    """Token files and certificates that a server follows, with a clock of the test's own."""

    def __init__(self, folder: Path) -> None:
        import trustme

        self.authority = trustme.CA()
        self.token, self.cert, self.key = (folder / name for name in ("token", "crt", "key"))
        self.write_pair()
        self.token.write_text(GOOD)
        self.now = 0.0
        settings = config(token_train_file=self.token, tls_certificate=self.cert, tls_key=self.key)
        self.files = CredentialFiles(settings, clock=lambda: self.now)
        self.ask = self.files._changed  # what gRPC calls before each handshake

    def write_pair(self) -> None:
        pair = self.authority.issue_cert("localhost")
        pair.cert_chain_pems[0].write_to_path(str(self.cert))
        pair.private_key_pem.write_to_path(str(self.key))

    def after_a_minute(self) -> None:
        self.now += 60
        self.files.refresh()

    def admits(self, token: str) -> bool:
        assert self.files.interceptor is not None
        return self.files.interceptor._find(token) is not None


def test_changed_files_are_noticed_within_a_minute_and_looked_at_no_more_often(tmp_path: Path) -> None:
    followed = Followed(tmp_path)
    followed.after_a_minute()
    assert followed.ask() is None, "nothing changed"
    followed.write_pair()
    followed.token.write_text(OTHER)
    followed.now += 59
    followed.files.refresh()
    assert (followed.ask(), followed.admits(GOOD), followed.admits(OTHER)) == (None, True, False)
    followed.now += 1
    followed.files.refresh()
    assert (followed.admits(GOOD), followed.admits(OTHER)) == (False, True)
    assert followed.ask() is not None
    assert followed.ask() is None, "once is enough"


def test_a_file_that_is_put_in_the_place_of_another_with_its_time_and_size_counts_as_changed(
    tmp_path: Path,
) -> None:
    followed = Followed(tmp_path)
    found = followed.token.stat()
    other = GOOD[::-1]
    part = write(tmp_path / "part", other)
    os.utime(part, ns=(found.st_atime_ns, found.st_mtime_ns))
    part.replace(followed.token)
    followed.after_a_minute()
    assert followed.admits(other)


def test_invalid_files_are_reported_once_and_the_old_ones_stay_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    followed = Followed(tmp_path)
    followed.token.write_text("")
    followed.key.unlink()
    for _ in range(3):
        followed.after_a_minute()
    errors = [record.getMessage() for record in caplog.records]
    assert [error.rpartition("; ")[2] for error in errors] == [
        "the previous certificates or tokens stay in use"
    ] * 2
    assert "serve.tls_key: " in errors[0]
    assert "contains no token" in errors[1]
    assert (followed.ask(), followed.admits(GOOD)) == (None, True)
    followed.token.write_text(OTHER)
    followed.after_a_minute()
    assert followed.admits(OTHER), "although the certificate is still invalid"
    followed.write_pair()
    followed.after_a_minute()
    assert followed.ask() is not None


def test_files_that_change_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = Followed(tmp_path)
    read = auth.read_tokens

    def replaced_meanwhile(settings: ServeConfig) -> list[auth.Token]:
        found = read(settings)
        write(followed.token, f"{OTHER}\n{GOOD}")
        monkeypatch.setattr(auth, "read_tokens", read)
        return found

    monkeypatch.setattr(auth, "read_tokens", replaced_meanwhile)
    followed.token.write_text(OTHER)
    followed.after_a_minute()
    assert followed.admits(GOOD), "the old ones, for now"
    followed.after_a_minute()
    assert (followed.admits(GOOD), followed.admits(OTHER)) == (True, True)


def test_a_call_is_named_by_its_token_or_else_its_certificate_and_neither_is_revealed() -> None:
    def name(token: str, *identities: bytes, has_tokens: bool, scheme: str = "Bearer ") -> str:
        context: Any = SimpleNamespace(
            peer_identities=lambda: identities or None,
            invocation_metadata=lambda: [("authorization", f"{scheme}{token}")] if token else [],
        )
        return auth.caller(context, has_tokens=has_tokens)

    ours = name(GOOD, b"a@example.org", has_tokens=True)
    assert ours == name(GOOD, has_tokens=True)
    for scheme in ("bearer ", "BEARER    "):  # accepted too
        assert ours == name(GOOD, has_tokens=True, scheme=scheme), "limits are those of the token"
    assert ours != name(OTHER, has_tokens=True)
    assert GOOD not in ours
    certificate = name("", b"a@example.org", has_tokens=False)
    assert certificate == name("made up", b"a@example.org", has_tokens=False), "nobody checks this token"
    assert certificate != name("", b"b@example.org", has_tokens=False)
    assert name("made up", has_tokens=False) == "", "plaintext on loopback"
