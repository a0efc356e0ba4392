"""`memphis publish HF_DIR --workdir RUN`: a model of a run as a folder to give away. No jax.

    RUN/merged/hf + records of RUN -> OUT: the weights, tokenizer with chat template, README.md,
                                      a certificate that covers all of it  [-> the hub]

The run's own folder stays as it is, since the ledger holds its hashes; weights are hard links where
the file system has them. Nothing leaves this machine without --upload.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memphis_jax.chat_template import chat_template, tokenizer_config
from memphis_jax.model_card import write_card
from memphis_jax.rounds.certificate import CERTIFICATE, check_certificate, file_hashes
from memphis_jax.rounds.files import sha256_file, write_json

OURS = ("README.md", "tokenizer_config.json", CERTIFICATE)  # written anew


def publish(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis publish",
        description="Make a folder to publish of a model that a run exported: weights, tokenizer "
        "with its chat template, model card. Uploads only with --upload.",
        epilog="Uploading uses the login of `hf auth login`, or HF_TOKEN.",
    )
    add = parser.add_argument
    add("hf", type=Path, metavar="HF_DIR", help="exported or merged model of the run")
    add("--workdir", required=True, type=Path, help="of `memphis rounds` or `memphis scribe`")
    add("--card", action="store_true", help="write README.md from the run's records")
    add(
        "--license", default="unknown", help="for the card, such as cc-by-sa-4.0 (default: unknown)"
    )
    add("--base-model", default="", metavar="OWNER/NAME", help="for the card")
    add("--out", type=Path, help="folder to write (default: WORKDIR/published)")
    add("--chat", action="store_true", help="template: reply in chat form unless told otherwise")
    add("--uncertified", action="store_true", help="take a folder without a valid certificate")
    add("--upload", metavar="OWNER/NAME", help="put the folder on the Hugging Face hub")
    add("--private", action="store_true", help="create a private repository")
    args = parser.parse_args(argv)
    out = args.out or args.workdir / "published"
    hashes = file_hashes(args.hf)
    if not args.uncertified:
        check_certificate(args.hf, hashes)
    build(args, out, hashes)
    print(f"{out}: {len(list(out.iterdir()))} files")
    if args.card and args.license == "unknown":
        print("note: the card says no licence; --license names it", file=sys.stderr)
    if args.upload:
        print(upload(out, args.upload, args.private))


def build(args: argparse.Namespace, out: Path, hashes: dict[str, str]) -> None:
    """Writes `out`, replacing an earlier one; it appears by rename."""
    if out.exists() and not _is_published(out) and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else: choose another --out")
    if args.hf.resolve() in (out.resolve(), *out.resolve().parents):
        raise FileExistsError(f"--out {out} lies in {args.hf}: choose another --out")
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        for name in hashes:
            if name not in OURS:
                _place(args.hf / name, building / name)
        template = chat_template(args.hf, rationale=not args.chat)
        write_json(building / "tokenizer_config.json", tokenizer_config(args.hf, template))
        if args.card:
            told = {"license": args.license, "base_model": args.base_model}
            write_card(args.hf, args.workdir, building, repo=args.upload or "", **told)
        _certify(args.hf, building, hashes)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def _is_published(folder: Path) -> bool:
    certificate = folder / CERTIFICATE
    return certificate.is_file() and "published_from" in json.loads(certificate.read_text("utf-8"))


def _place(source: Path, target: Path) -> None:
    """Weights are linked; text is copied, which somebody may edit before it is uploaded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.suffix == ".safetensors":
            return os.link(source, target)
    except OSError:  # another file system, or one without links
        pass
    shutil.copyfile(source, target)


def _certify(hf: Path, folder: Path, hashes: dict[str, str]) -> None:
    """The model's certificate, now of these files; it names the folder they were taken from."""
    path = hf / CERTIFICATE
    certificate = json.loads(path.read_text("utf-8")) if path.is_file() else {"format": 1}
    files = {name: value for name, value in hashes.items() if name not in OURS}
    files |= {name: sha256_file(folder / name) for name in OURS if (folder / name).is_file()}
    certificate = _without_places(certificate)
    taken = {"folder": hf.resolve().name}
    if path.is_file():
        taken["certificate_sha256"] = sha256_file(path)
    write_json(folder / CERTIFICATE, {**certificate, "files": files, "published_from": taken})


def _without_places(told: Any) -> Any:
    """Of folders on this machine, which are nobody's business, the last name only."""
    if isinstance(told, dict):
        return {
            key: Path(value).name
            if key in ("folder", "checkpoint") and isinstance(value, str)
            else _without_places(value)
            for key, value in told.items()
        }
    return [_without_places(one) for one in told] if isinstance(told, list) else told


def upload(folder: Path, repo: str, private: bool) -> str:
    """Creates the repository where it is new, and uploads; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    created = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="memphis publish")
    return str(created)
