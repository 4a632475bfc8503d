"""Signatures of bundles: Ed25519 (RFC 8032) over the bytes of the manifest.

The private key is a PEM file (PKCS 8, no passphrase) that the variable GRIMACE_SIGNING_KEY names;
where it names none, one is made for this checkout, in `.grimace/`, which git does not track. A
signature is trusted where its public key is the one of the PEM file that GRIMACE_VERIFY_KEY names,
else the one that belongs to the private key. Who hands bundles out makes a key of their own, keeps
it outside the checkout and publishes its public half:

    openssl genpkey -algorithm ed25519 -out signing-key.pem
    GRIMACE_SIGNING_KEY=signing-key.pem uv run python -m pipelines.bundles.signatures > public.pem
    GRIMACE_SIGNING_KEY=signing-key.pem uv run dvc repro -f export

Who received one checks it:

    GRIMACE_VERIFY_KEY=public.pem uv run python -m pipelines.bundles.signatures --check FOLDER
"""

import argparse
import base64
import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pipelines.cli import GrimaceError, run

OWN_KEY = Path(".grimace/signing-key.pem")


def main() -> None:
    """Print the trusted public key, or check bundles that came from elsewhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, nargs="+", metavar="FOLDER", help="bundles to check")
    arguments = parser.parse_args()
    if not arguments.check:
        print(_pem(_trusted()), end="")
        return
    from pipelines import bundles

    for folder in arguments.check:
        manifest = bundles.read(folder)
        bundles.check_files(folder, manifest)
        print(f"{folder}: {len(manifest['files'])} files as signed")


def sign(file: Path, signature: Path) -> None:
    """Write the signature of a file's bytes.

    Raises:
        GrimaceError: GRIMACE_SIGNING_KEY names no usable key.
    """
    key = _private()
    content = {
        "algorithm": "Ed25519",
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(file.read_bytes())).decode(),
    }
    signature.write_text(json.dumps(content, indent=2) + "\n")


def check(file: Path, signature: Path) -> None:
    """Check a file against its signature.

    Raises:
        GrimaceError: there is no signature, it is damaged, by another key than the trusted one,
            or of other bytes.
    """
    if not signature.is_file():
        raise GrimaceError(f"{signature} is missing: {file} is not signed; export again")
    try:
        content = json.loads(signature.read_bytes())
        raw_key = base64.b64decode(content["public_key"], validate=True)
        raw = base64.b64decode(content["signature"], validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw_key)
        assert content["algorithm"] == "Ed25519"
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise GrimaceError(f"{signature} is damaged ({error!r}); export again") from None
    if raw_key != _trusted().public_bytes_raw():
        raise GrimaceError(
            f"{file} is signed by a key that is not trusted here. If it comes from someone whose "
            "public key you have, name that file in GRIMACE_VERIFY_KEY; else export again"
        )
    try:
        key.verify(raw, file.read_bytes())
    except InvalidSignature:
        raise GrimaceError(
            f"{file} was changed after it was signed: its signature does not fit; export again"
        ) from None


def _trusted() -> Ed25519PublicKey:
    named = os.environ.get("GRIMACE_VERIFY_KEY")
    if not named:
        return _private().public_key()
    try:
        key = serialization.load_pem_public_key(Path(named).read_bytes())
        assert isinstance(key, Ed25519PublicKey)
    except (OSError, ValueError, UnsupportedAlgorithm, AssertionError) as error:
        raise GrimaceError(
            f"GRIMACE_VERIFY_KEY names {named}, which is no Ed25519 public key in PEM ({error})"
        ) from None
    return key


def _private() -> Ed25519PrivateKey:
    named = os.environ.get("GRIMACE_SIGNING_KEY")
    if not named:
        _make(OWN_KEY)
    path = Path(named or OWN_KEY)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, AssertionError) as error:
        raise GrimaceError(
            f"{path} is no Ed25519 private key in PEM without a passphrase ({error}); name one in "
            "GRIMACE_SIGNING_KEY, or unset that for a key of this checkout"
        ) from None
    return key


def _make(path: Path) -> None:
    """Make a key unless there is one; of two processes that do so at once, one prevails."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    content = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with NamedTemporaryFile(dir=path.parent) as file:  # which nobody else may read
        file.write(content)
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)


def _pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


if __name__ == "__main__":
    run(main)
