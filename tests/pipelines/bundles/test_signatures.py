import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pipelines.bundles import signatures
from pipelines.cli import GrimaceError

REPOSITORY = Path(signatures.__file__).parents[2]


def test_a_key_of_this_checkout_is_made_once_for_its_owner_alone(tmp_path):
    file, signature = tmp_path / "file", tmp_path / "file.sig"
    file.write_bytes(b"content")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: signatures.sign(file, tmp_path / f"{n}.sig"), range(4)))
    for number in range(4):
        signatures.check(file, tmp_path / f"{number}.sig")
    key = signatures.OWN_KEY.read_bytes()
    assert stat.S_IMODE(signatures.OWN_KEY.stat().st_mode) == 0o600
    signatures.sign(file, signature)
    assert signatures.OWN_KEY.read_bytes() == key


def test_keys_can_be_brought(tmp_path, monkeypatch):
    file, signature = tmp_path / "file", tmp_path / "file.sig"
    file.write_bytes(b"content")
    makers, others = keys(tmp_path / "maker"), keys(tmp_path / "other")
    monkeypatch.setenv("GRIMACE_SIGNING_KEY", str(makers[0]))
    signatures.sign(file, signature)
    signatures.check(file, signature)
    assert not signatures.OWN_KEY.exists()
    monkeypatch.delenv("GRIMACE_SIGNING_KEY")
    monkeypatch.setenv("GRIMACE_VERIFY_KEY", str(makers[1]))
    signatures.check(file, signature)
    monkeypatch.setenv("GRIMACE_VERIFY_KEY", str(others[1]))
    with pytest.raises(GrimaceError, match=r"not trusted here.*GRIMACE_VERIFY_KEY"):
        signatures.check(file, signature)


def test_what_is_no_key_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    signatures.sign(file, tmp_path / "file.sig")
    rsa = generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(
        rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    for name in ("absent.pem", "file", "rsa.pem"):
        monkeypatch.setenv("GRIMACE_SIGNING_KEY", str(tmp_path / name))
        with pytest.raises(GrimaceError, match=f"{name} is no Ed25519 private key"):
            signatures.sign(file, tmp_path / "other.sig")
        monkeypatch.delenv("GRIMACE_SIGNING_KEY")
        monkeypatch.setenv("GRIMACE_VERIFY_KEY", str(tmp_path / name))
        with pytest.raises(GrimaceError, match=f"{name}, which is no Ed25519 public key"):
            signatures.check(file, tmp_path / "file.sig")
        monkeypatch.delenv("GRIMACE_VERIFY_KEY")


def test_who_receives_a_bundle_checks_it_by_the_makers_public_key(make, tmp_path, monkeypatch):
    private, _ = keys(tmp_path / "maker")
    monkeypatch.setenv("GRIMACE_SIGNING_KEY", str(private))
    bundle = make()
    public = tmp_path / "published.pem"
    public.write_text(command({"GRIMACE_SIGNING_KEY": str(private)}).stdout)
    monkeypatch.delenv("GRIMACE_SIGNING_KEY")
    done = command({"GRIMACE_VERIFY_KEY": str(public)}, "--check", bundle)
    assert done.returncode == 0 and "files as signed" in done.stdout
    (bundle / "int8.tflite").write_bytes(b"another")
    done = command({"GRIMACE_VERIFY_KEY": str(public)}, "--check", bundle)
    assert done.returncode == 1
    assert "int8.tflite has 7 bytes, the manifest says 100" in done.stderr


def command(environment, *arguments) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "pipelines.bundles.signatures", *map(str, arguments)]
    return subprocess.run(
        run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def keys(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    key = Ed25519PrivateKey.generate()
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public
