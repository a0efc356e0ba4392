import json

import ml_dtypes
import numpy as np
import pytest
from reference_models import SMALL, make_hf, rewrite
from safetensors.numpy import save_file

from convert import load_hf
from convert.from_hf import from_hf
from convert.hf_folder import ConvertError, open_folder, published
from memphis_jax.model import flatten
from memphis_jax.tensors import INDEX


def test_old_epoch_folder_is_read_and_its_buffers_ignored(tmp_path):
    make_hf(tmp_path / "hf")
    expected = flatten(load_hf(tmp_path / "hf"))
    buffer = np.ones(3, np.float32)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({name: buffer for name in names}))
    config = {key: value for key, value in SMALL.items() if key != "partial_rotary_factor"}
    config |= {"model_type": "stablelm_epoch", "rope_pct": 0.5, "norm_eps": 1e-5}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for leaf, array in flatten(load_hf(tmp_path / "hf")).items():
        np.testing.assert_array_equal(array, expected[leaf])


def test_everything_wrong_is_named_at_once(tmp_path):
    make_hf(tmp_path)

    def damage(tensors):
        del tensors["model.norm.bias"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(80, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
        tensors["model.norm.weight"] = np.zeros(48, np.int8)
        name = "model.layers.1.mlp.gate_proj.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    rewrite(tmp_path, damage)
    repeated = {"model.embed_tokens.weight": np.zeros((97, 48), np.float32)}
    save_file(repeated, tmp_path / "second.safetensors")
    with pytest.raises(ConvertError) as caught:
        from_hf(tmp_path, tmp_path / "ckpt")
    message = str(caught.value)
    for part in (
        "missing: model.norm.bias",
        "missing: model.layers.1.mlp.up_proj.weight",
        "unknown: model.layers.0.mlp.up_proj.bias in model.safetensors",
        "wrong shape: lm_head.weight is [48, 97], the config gives [97, 48]",
        "wrong dtype: model.norm.weight is I8",
        "mixed dtypes: layers/mlp/gate_proj/kernel is BF16 and F32",
        "repeated: model.embed_tokens.weight in model.safetensors, second.safetensors",
    ):
        assert part in message
    assert message.count(";") == 6  # and nothing else
    assert not (tmp_path / "ckpt").exists()


def test_head_stored_beside_a_tied_embedding(tmp_path):
    make_hf(tmp_path, tie_word_embeddings=True)
    name, twin = "lm_head.weight", "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[twin].copy()}))
    assert "lm_head/kernel" not in flatten(load_hf(tmp_path))
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[twin] + 1}))
    with pytest.raises(ConvertError, match=r"tie_word_embeddings is true, but lm_head\.weight"):
        load_hf(tmp_path)


def test_pickle_is_refused_without_being_opened(tmp_path):
    make_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin.*pickle is never loaded"):
        load_hf(tmp_path)


@pytest.mark.parametrize("keep", [-1, 100, 3, 0])  # bytes; -1 = all but the last
def test_truncated_file_is_named(keep, tmp_path):
    make_hf(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConvertError, match=rf"{path} \({path.stat().st_size} bytes\) is truncated"):
        load_hf(tmp_path)


def test_absent_shard_is_named(tmp_path):
    make_hf(tmp_path, shard="40KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConvertError, match=f"absent: {gone.name}"):
        open_folder(tmp_path)


@pytest.mark.parametrize("weight_map", [["a"], {"a": ["b"]}, {"a": 1}, None])
def test_an_index_of_another_form_is_named(tmp_path, weight_map):
    make_hf(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConvertError, match=f"{INDEX}: weight_map is not"):
        open_folder(tmp_path)


def test_what_a_kill_between_two_renames_left_aside_is_put_back(tmp_path):
    """The new output was complete, but if it can no longer be made the old one is still there."""
    aside = tmp_path / ".out.old"
    aside.mkdir()
    (aside / "weights").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    out, source = tmp_path / "out", tmp_path / "in"
    with pytest.raises(KeyError), published(out, source, lambda _: True, "ours"):
        raise KeyError("the source is gone")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "old"
