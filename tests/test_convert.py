import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from reference_models import FAMILY, SMALL, make_hf, read_folder, reference_logits, rewrite
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

from convert import load_hf
from convert.from_hf import from_hf
from convert.hf_folder import ConvertError
from convert.mapping import HF_NAMES, places
from convert.to_hf import to_hf
from convert.verify import verify
from memphis_jax.checkpoint import open_manager, restore_model, save
from memphis_jax.config import ModelConfig
from memphis_jax.model import StableLM, abstract, flatten
from memphis_jax.tensors import split

REPO = Path(__file__).resolve().parents[1]
WHOLE = {"qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 2}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("name", FAMILY)
def test_table_has_the_names_and_shapes_of_transformers(name):
    options = {**SMALL, **FAMILY[name]}
    reference = StableLmForCausalLM(StableLmConfig(**options)).state_dict()
    if options.get("tie_word_embeddings"):
        reference.pop("lm_head.weight")
    table = places(ModelConfig.from_hf({**options, "model_type": "stablelm"}))
    assert {n: p.shape for n, p in table.items()} == {
        n: tuple(t.shape) for n, t in reference.items()
    }


def test_table_covers_every_element_of_every_leaf_once():
    config = ModelConfig(**{**SMALL, **WHOLE})
    counts = {leaf: np.zeros(a.shape, int) for leaf, a in flatten(abstract(config)).items()}
    assert set(counts) == set(HF_NAMES)
    for place in places(config).values():
        counts[place.leaf][place.index] += 1
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["3b-ratios", "qk-layernorm", "parallel-residual", "tied"])
def test_there_and_back_is_bit_exact(name, dtype, tmp_path):
    make_hf(tmp_path / "hf", dtype, **FAMILY[name])
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_folder(tmp_path / "back"), read_folder(tmp_path / "hf"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_bit_pattern_survives(dtype, tmp_path):
    """Random bits: infinities, denormals, NaNs with payloads, negative zeros."""
    make_hf(tmp_path / "hf", dtype, **WHOLE)
    rng = np.random.default_rng(0)

    def scramble(tensors):
        for name, array in tensors.items():
            tensors[name] = np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)

    rewrite(tmp_path / "hf", scramble)
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_folder(tmp_path / "back"), read_folder(tmp_path / "hf"))
    assert verify(tmp_path / "back", tmp_path / "ckpt").differences == []


def test_shards_in_and_out(tmp_path):
    make_hf(tmp_path / "hf", shard="40KB", **WHOLE)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    limit = 50_000
    to_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_size=limit)
    assert_same_bits(read_folder(tmp_path / "back"), read_folder(tmp_path / "hf"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    stored = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {n: file for file, tensors in stored.items() for n in tensors}
    sizes = [sum(a.nbytes for a in tensors.values()) for tensors in stored.values()]
    assert max(sizes) <= limit and index["metadata"]["total_size"] == sum(sizes)


def test_split_lets_a_large_tensor_stand_alone():
    shards = split({"a": 4, "b": 4, "c": 30, "d": 2}, 10)
    assert list(shards.values()) == [["a", "b"], ["c"], ["d"]]
    assert split({"a": 4, "b": 6}, 10) == {"model.safetensors": ["a", "b"]}


@pytest.mark.parametrize("name", ["3b-ratios", "parallel-qk-layernorm", "tied"])
def test_transformers_loads_the_export(name, tmp_path):
    reference = make_hf(tmp_path / "hf", **FAMILY[name])
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_size=100_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype="auto"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    tokens = np.random.default_rng(0).integers(0, 97, (2, 30))
    np.testing.assert_array_equal(
        reference_logits(loaded.eval(), tokens), reference_logits(reference, tokens)
    )


def test_checkpoint_is_read_by_the_trainer_like_the_folder(tmp_path):
    make_hf(tmp_path / "hf", "bfloat16", **WHOLE)
    add_tokenizer(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    model, meta = restore_model(tmp_path / "ckpt")
    expected = flatten(load_hf(tmp_path / "hf"))
    for leaf, array in flatten(model).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[leaf])
    assert meta["model"]["qk_layernorm"] is True
    assert (tmp_path / "ckpt" / "tokenizer" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    kept, _ = restore_model(tmp_path / "ckpt", "bfloat16")
    assert flatten(kept)["lm_head/kernel"].dtype == ml_dtypes.bfloat16


def test_export_of_a_trained_step_in_both_dtypes(tmp_path):
    model = StableLM(ModelConfig(**{**SMALL, **WHOLE}), jax.random.key(3))
    with open_manager(tmp_path / "run", keep=1) as manager:
        save(manager, 7, model, {"phase": "sft"})
    to_hf(tmp_path / "run", tmp_path / "wide")
    to_hf(tmp_path / "run", tmp_path / "narrow", "bfloat16")
    wide, narrow = read_folder(tmp_path / "wide"), read_folder(tmp_path / "narrow")
    for leaf, array in flatten(load_hf(tmp_path / "wide")).items():
        np.testing.assert_array_equal(array, flatten(model)[leaf])
    for name, array in wide.items():  # torch rounds to nearest even, too
        rounded = torch.tensor(array).to(torch.bfloat16).view(torch.int16).numpy()
        np.testing.assert_array_equal(narrow[name].view(np.int16), rounded)
    for folder in ("wide", "narrow"):
        verdict = verify(tmp_path / folder, tmp_path / "run")
        assert verdict.differences == [] and verdict.compared == len(wide)
    from_hf(tmp_path / "wide", tmp_path / "again")  # as step 0, which is no other model
    verdict = verify(tmp_path / "wide", tmp_path / "again")
    assert verdict.differences == [] and "exported from step 7, and" in verdict.notes[0]
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def test_certificate_matches_what_is_on_disk(tmp_path):
    make_hf(tmp_path / "hf", "bfloat16", bos_token_id=3, eos_token_id=5)
    add_tokenizer(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    returned = to_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_size=60_000)
    certificate = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert certificate == json.loads(json.dumps(returned))
    for name, array in read_folder(tmp_path / "back").items():
        assert certificate["tensors"].pop(name) == {
            "dtype": "bfloat16",
            "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
    assert certificate["tensors"] == {}
    written = {p.name: p for p in (tmp_path / "back").iterdir() if p.name != "conversion.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= written.keys()
    for name, path in written.items():
        assert certificate["files"].pop(name) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert certificate["files"] == {}
    assert certificate["format"] == 1 and certificate["source"]["step"] == 0
    count = len(returned["tensors"])
    assert certificate["coverage"]["tensors_mapped"] == certificate["coverage"]["tensors"] == count
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": 5}


def test_verify_finds_one_changed_value(tmp_path):
    make_hf(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert verify(tmp_path / "hf", tmp_path / "ckpt").differences == []

    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][5, 6] += 0.25

    rewrite(tmp_path / "back", change)
    (tmp_path / "back" / "generation_config.json").unlink()
    differences = verify(tmp_path / "back", tmp_path / "ckpt").differences
    assert [line for line in differences if "1 of 3840 values differ, at most by 0.25" in line]
    certified = [line for line in differences if line.startswith("conversion.json")]
    assert [re.sub(r".*: (\w+ \S+) is.*", r"\1", line) for line in certified] == [
        "tensor model.layers.1.mlp.down_proj.weight",
        "file generation_config.json",
        "file model.safetensors",
    ]


def test_verify_finds_a_changed_config_and_a_lost_tensor(tmp_path):
    make_hf(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    edit_config(tmp_path / "hf", layer_norm_eps=0.001)
    (line,) = verify(tmp_path / "hf", tmp_path / "ckpt").differences
    assert "layer_norm_eps: 1e-05 -> 0.001" in line
    rewrite(tmp_path / "hf", lambda tensors: tensors.pop("model.norm.bias"))
    (line,) = verify(tmp_path / "hf", tmp_path / "ckpt").differences
    assert "missing: model.norm.bias" in line


def test_only_own_output_is_replaced(tmp_path):
    make_hf(tmp_path / "hf")
    for _ in range(2):  # the second replaces the first
        from_hf(tmp_path / "hf", tmp_path / "ckpt")
        to_hf(tmp_path / "ckpt", tmp_path / "back")
    with pytest.raises(ConvertError, match="not empty and is not an earlier export"):
        to_hf(tmp_path / "ckpt", tmp_path / "hf")
    model, _ = restore_model(tmp_path / "ckpt")
    with open_manager(tmp_path / "ckpt", keep=2) as manager:
        save(manager, 3, model, {})  # training went on in the same folder
    with pytest.raises(ConvertError, match="not empty and is not an earlier conversion"):
        from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ckpt", "hf"]


def test_an_export_with_somebodys_own_files_is_not_replaced(tmp_path):
    make_hf(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "out")
    own, changed = tmp_path / "out" / ".git" / "HEAD", tmp_path / "out" / "config.json"
    own.parent.mkdir()
    own.write_text("ref: refs/heads/main")
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(FileExistsError, match=r"and \.git/HEAD, config\.json with it, which"):
        to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert own.is_file()
    shutil.move(own.parent, tmp_path)
    changed.write_text(changed.read_text()[:-1])
    to_hf(tmp_path / "ckpt", tmp_path / "out")


def test_what_is_read_is_never_replaced(tmp_path):
    """An export in which its checkpoint lies is an earlier export, but all that is left of it."""
    make_hf(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "ckpt" / "hf")  # inside what is read: nothing is replaced
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    from_hf(tmp_path / "back", tmp_path / "back" / "ckpt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConvertError, match=r"back holds .*back/ckpt, which is read"):
        to_hf(tmp_path / "back" / "ckpt", tmp_path / "back")
    with pytest.raises(ConvertError, match=r"ckpt holds .*ckpt/hf, which is read"):
        from_hf(tmp_path / "ckpt" / "hf", tmp_path / "ckpt")
    assert sorted(tmp_path.rglob("*")) == before


KILLED = """
import os, signal, sys
from convert.from_hf import from_hf
from convert.to_hf import to_hf

def progress(done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

{"from_hf": from_hf, "to_hf": to_hf}[sys.argv[1]](sys.argv[2], sys.argv[3], progress=progress)
"""


def run_and_kill(direction: str, source: Path, target: Path) -> None:
    command = [sys.executable, "-c", KILLED, direction, str(source), str(target)]
    done = subprocess.run(command, cwd=REPO, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_killed_half_way_leaves_the_target_as_it_was(tmp_path):
    make_hf(tmp_path / "hf", **WHOLE)
    run_and_kill("from_hf", tmp_path / "hf", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    before = {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()}
    run_and_kill("to_hf", tmp_path / "ckpt", tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == before
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ckpt", "hf"]


# VmHWM, not ru_maxrss: Linux hands the parent's ru_maxrss down to a started process.
PEAK = """
import re, sys
from convert.from_hf import from_hf
from convert.to_hf import to_hf

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = peak()
{"from_hf": from_hf, "to_hf": to_hf}[sys.argv[1]](sys.argv[2], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_bounded_by_two_tensors(tmp_path):
    """Not by a stacked leaf: beside two of the largest tensors there is less than such a stack."""
    config = ModelConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    rng = np.random.default_rng(0)
    tensors = {n: rng.random(p.shape, np.float32) for n, p in places(config).items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    whole = sum(array.nbytes for array in tensors.values())
    largest = max(array.nbytes for array in tensors.values())
    stacked = 4 * max(leaf.size for leaf in flatten(abstract(config)).values())
    bound = 2 * largest + 64e6
    assert whole > 400e6 and bound < stacked
    for direction, source, target in (("from_hf", "hf", "ckpt"), ("to_hf", "ckpt", "back")):
        command = [sys.executable, "-c", PEAK, direction, tmp_path / source, tmp_path / target]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        print(
            f"{direction}: {int(done.stdout) / 1e6:.0f} MB; whole {whole / 1e6:.0f} MB, "
            f"largest tensor {largest / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB"
        )
        assert int(done.stdout) < bound, direction
    assert_same_bits(read_folder(tmp_path / "back"), tensors)
