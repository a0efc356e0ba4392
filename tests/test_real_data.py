"""The real ingredients of TinyCoT, through `memphis data` and the loader, with the 50k tokenizer.

What is trained on is derived anew here from the raw rows: no template of ours is imported.
"""

import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tinycot_like import read_all
from tokenizers import Tokenizer

from memphis_jax.__main__ import main
from memphis_jax.data.examples import open_built
from memphis_jax.data.loader import Loader, sft_loader
from memphis_jax.rounds.files import read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

SEQ_LEN, BATCH_SIZE, EPOCHS = 4096, 8, 2
HELD_OUT = 100
EOS = "<|endoftext|>"
COUNTS = {
    "gsm8k": 7473,
    "strategyqa": 229,
    "tal_scq5k": 1000,
    "math": 12,
    "flan_aqua": 2728,
    "flan_ecqa": 7112,
    "flan_strategyqa": 2061,
    "flan_qasc": 1084,
}
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.data = {data}
    config.sft = {{"epochs": {epochs}, "batch_size": {batch_size}, "seq_len": {seq_len}}}
    config.sft.optimizer = ConfigDict()
    config.rank = {{"epochs": 1, "batch_size": 8, "seq_len": 1024}}
    config.rank.optimizer = ConfigDict()
    return config
"""


class Built(NamedTuple):
    folder: Path
    rows: list[dict[str, str]]
    manifest: dict[str, Any]
    loader: Loader
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def built(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Every real row, guarded against real evaluation sets, as a user would build it."""
    work = tmp_path_factory.mktemp("real")
    data = shared / "data"
    rows = read_all(data)
    write_jsonl(work / "rows.jsonl", rows)
    tokenizer = work / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(data / "stablelm/20B_tokenizer.json", tokenizer / "tokenizer.json")
    shutil.copy(data / "stablelm/special_tokens_map.json", tokenizer)
    sets = ("bbh/tasks", "agieval_v1_en", "aqua/dev.json", "aqua/test.json")
    settings = {
        "source": "mixture",
        "mixture": {"tinycot": {"path": str(work / "rows.jsonl")}},
        "tokenizer": str(tokenizer),
        "num_validation": HELD_OUT,
        "num_test": HELD_OUT,
        "evaluation": tuple(str(data / name) for name in sets),
    }
    sizes = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
    (work / "config.py").write_text(CONFIG.format(data=settings, **sizes))
    main(["data", "--config", str(work / "config.py"), "--out", str(work / "built")])
    examples, manifest = open_built(work / "built")
    loader = sft_loader(
        examples,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        seed=0,
    )
    raw = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return Built(work / "built", rows, manifest, loader, raw)


def sections(row: dict[str, str]) -> tuple[str, str]:
    """(what is not trained, what is), from a raw row; the tokenizer composes characters (NFC)."""
    prompt, rationale, target = (row[name].strip() for name in ("prompt", "rationale", "target"))
    not_trained = f"### User:\n{prompt}\n### Rationale:\n"
    trained = f"{rationale}\n### Answer:\n{target}{EOS}"
    return unicodedata.normalize("NFC", not_trained), unicodedata.normalize("NFC", trained)


def segments(batch: dict[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """(the tokens that are not trained, those that are) of every segment of a batch."""
    for ids, tokens, targets, mask in zip(
        *(batch[name][0] for name in ("segment_ids", "tokens", "targets", "loss_mask")), strict=True
    ):
        assert not mask[ids == 0].any()
        for segment in range(1, ids.max(initial=0) + 1):
            here = np.flatnonzero(ids == segment)
            assert here.tolist() == list(range(here[0], here[-1] + 1))
            given, wanted, trained = tokens[here], targets[here], mask[here]
            assert given[1:].tolist() == wanted[:-1].tolist()
            assert trained.tolist() == sorted(trained.tolist())  # the loss is the end, in one piece
            yield [int(given[0]), *wanted[~trained].tolist()], wanted[trained].tolist()


def test_every_row_is_in_tinycots_shape(built: Built) -> None:
    assert Counter(row["source"] for row in built.rows) == COUNTS
    forms = {
        "gsm8k": r"-?[\d,]+(\.\d+)?",
        "strategyqa": "yes|no",
        "tal_scq5k": "[A-E]",
        "math": ".+",
        "flan_aqua": r"\([A-E]\)",
        "flan_ecqa": ".+",
        "flan_strategyqa": "yes|no",
        "flan_qasc": r"\([A-H]\)",
    }
    for row in built.rows:
        assert all(row[name].strip() for name in ("prompt", "rationale", "target")), row
        assert re.fullmatch(forms[row["source"]], row["target"]), row
        assert not re.search(r"<<|>>|####", row["rationale"]), row
        if row["source"] == "math":
            assert f"\\boxed{{{row['target']}}}" in row["rationale"]
        elif row["target"][:1] == "(" or row["source"] in ("tal_scq5k", "flan_ecqa"):
            assert row["target"] in row["prompt"], row


def test_no_row_is_lost_silently(built: Built) -> None:
    (record,) = built.manifest["data_sets"].values()
    assert record["rows_in"] == len(built.rows)
    assert record["rows_in"] == record["items"] + sum(record["rows_dropped"].values())
    assert record["items"] == record["examples"] + sum(record["items_dropped"].values())
    assert len(read_jsonl(built.folder / "train.jsonl")) == record["examples"]
    assert record["longest"] < SEQ_LEN
    contaminated = sum(record["contaminated"].values())
    held_out = record["items"] - record["examples"] - contaminated
    # Some questions are there twice, and all rows of a held-out question go.
    assert 2 * HELD_OUT <= held_out < 2.2 * HELD_OUT
    assert 0 < contaminated < 10  # of AQuA: measured 6


def test_every_segment_of_both_epochs_is_a_raw_row_trained_on_its_answer(built: Built) -> None:
    expected = Counter(map(sections, built.rows))
    epochs = [read_epoch(built, epoch) for epoch in range(EPOCHS)]
    assert epochs[0] != epochs[1]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert len(epochs[0]) == built.manifest["totals"]["examples"]
    assert not Counter(epochs[0]) - expected
    held_out = [read_jsonl(built.folder / f"{split}.jsonl") for split in ("validation", "test")]
    assert [len(rows) for rows in held_out] == [HELD_OUT, HELD_OUT]
    questions = {sections(row)[0] for rows in held_out for row in rows}
    missing = expected - Counter(epochs[0])
    guarded = [one for one in missing.elements() if one[0] not in questions]
    assert questions <= {one[0] for one in missing}
    of_aqua = {sections(row) for row in built.rows if row["source"] == "flan_aqua"}
    (record,) = built.manifest["data_sets"].values()
    assert len(guarded) == sum(record["contaminated"].values()) and of_aqua.issuperset(guarded)


def read_epoch(built: Built, epoch: int) -> list[tuple[str, str]]:
    """The texts of all segments of an epoch, in order, as `sections` gives them."""
    per_epoch = len(built.loader) // EPOCHS
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    found = [pair for step in steps for pair in segments(built.loader[step])]
    for not_trained, trained in found:
        assert (trained + not_trained).count(0) == 1 and trained[-1] == 0  # 0 is EOS
    texts = [
        built.tokenizer.decode_batch([pair[part] for pair in found], skip_special_tokens=False)
        for part in (0, 1)
    ]
    return list(zip(*texts, strict=True))


def test_rows_of_4096_are_filled_to_97_percent(built: Built) -> None:
    """Over an epoch, its last batch and that batch's empty rows included."""
    filled = [
        (batch["segment_ids"] > 0).mean()
        for batch in map(built.loader.__getitem__, range(len(built.loader)))
    ]
    per_epoch = len(filled) // EPOCHS
    for start in range(0, len(filled), per_epoch):
        epoch = filled[start : start + per_epoch]
        assert np.mean(epoch) >= 0.97
        assert np.mean(epoch[:-1]) >= 0.99
    trained = sum(int(built.loader[step]["loss_mask"].sum()) for step in range(per_epoch))
    assert trained == built.manifest["totals"]["trained_tokens"]
