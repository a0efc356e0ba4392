"""`memphis publish HF_DIR --workdir RUN`: a model of a run as a folder to give away. No jax.

    RUN/merged/hf + records of RUN -> OUT: the weights, tokenizer with chat template, README.md,
                                      a certificate that covers all of it  [-> the hub]

The run's own folder stays as it is, since the ledger holds its hashes; weights are hard links where
the file system has them. Nothing leaves this machine without --upload.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memphis_jax.chat_template import chat_template, tokenizer_config
from memphis_jax.model_card import read_json, write_card
from memphis_jax.rounds.certificate import (
    CERTIFICATE,
    check_certificate,
    file_hashes,
    is_replaceable,
)
from memphis_jax.rounds.files import new_folder, sha256_file, write_json

_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
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
        "--license",
        default="unknown",
        help="for the card, as the hub names it: apache-2.0, cc-by-sa-4.0, other ... (default: "
        "unknown)",
    )
    add("--base-model", default="", metavar="OWNER/NAME", help="for the card")
    add("--out", type=Path, help="folder to write (default: WORKDIR/published)")
    add("--chat", action="store_true", help="template: reply in chat form unless told otherwise")
    add("--uncertified", action="store_true", help="take a folder without a valid certificate")
    add("--upload", metavar="OWNER/NAME", help="put the folder on the Hugging Face hub")
    add("--private", action="store_true", help="create a private repository")
    args = parser.parse_args(argv)
    _check(parser, args)
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


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with the parser's error before anything is hashed or written."""
    for name, folder in (("HF_DIR", args.hf), ("--workdir", args.workdir)):
        if not folder.is_dir():
            parser.error(f"{name} {folder} is not a folder")
    for name, repo in (("--upload", args.upload), ("--base-model", args.base_model or None)):
        if repo is not None and (problem := _no_repo(repo)):
            parser.error(f"{name} {repo!r}: {problem}")
    if args.private and args.upload is None:
        parser.error("--private is about the repository of --upload, which is not given")
    if not _LICENSE.fullmatch(args.license):
        parser.error(
            f"--license {args.license!r} is not how the hub names a licence: lower-case letters, "
            "digits, dots and hyphens, such as apache-2.0, mit or cc-by-sa-4.0; `other` for one "
            "that is not on https://huggingface.co/docs/hub/repositories-licenses"
        )


def _no_repo(name: str) -> str:
    """What is wrong with the name of a repository; "" where nothing is."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1 or name.startswith("/"):
        return "give OWNER/NAME, such as euclaise/Memphis-CoT-3B"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return ""


def build(args: argparse.Namespace, out: Path, hashes: dict[str, str]) -> None:
    """Writes `out`, replacing an earlier one; it appears by rename."""
    earlier = _is_published(out) and is_replaceable(out)
    if out.exists() and not earlier and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else: choose another --out")
    if args.hf.resolve() in (out.resolve(), *out.resolve().parents):
        raise FileExistsError(f"--out {out} lies in {args.hf}: choose another --out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        read_json(args.hf / name)  # raises where it is broken
    with new_folder(out) as building:
        for name in hashes:
            if name not in OURS:
                _place(args.hf / name, building / name)
        template = chat_template(args.hf, rationale=not args.chat)
        write_json(building / "tokenizer_config.json", tokenizer_config(args.hf, template))
        if args.card:
            told = {"license": args.license, "base_model": args.base_model}
            write_card(args.hf, args.workdir, building, repo=args.upload or "", **told)
        _certify(args.hf, building, hashes)


def _is_published(folder: Path) -> bool:
    return "published_from" in read_json(folder / CERTIFICATE)


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
    certificate = read_json(path) or {"format": 1}
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
    """Creates the repository where it is new, and uploads; returns its address.

    Raises RuntimeError, which says how to go on, for whatever the network or the hub objects to.
    """
    from huggingface_hub import HfApi

    message = "memphis publish"
    try:
        api = HfApi()
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the http client and the hub each have their own kinds
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        by_hand = shlex.join(["hf", "upload", repo, str(folder), *["--private"] * private])
        raise RuntimeError(
            f"{folder} is ready, but not on the hub as {repo} ({told}): check the network and `hf "
            f"auth login`, then give the same command again, or upload it with `{by_hand}`"
        ) from error
    return str(created)
