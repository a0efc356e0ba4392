"""Config errors name the field and the fix; every value reaches what it is for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, named_leaves, tiny_model
from transformers import StableLmConfig

from memphis_jax import config as configs
from memphis_jax.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    build,
    check_context,
    load,
)
from memphis_jax.fields import difference
from memphis_jax.model import StableLM

PHASE = {"epochs": 1, "batch_size": 4, "seq_len": 32, "optimizer": {}}
SECTIONS: dict[str, Any] = {
    "sft": PHASE,
    "rank": PHASE,
    "data": {"num_train": 4, "num_validation": 2, "num_test": 2},
}
FILE = f"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({SECTIONS!r})
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return str(file)


def changed(where: str, value: Any) -> dict[str, Any]:
    """SECTIONS with one value set, by its dotted name."""
    values = json.loads(json.dumps(SECTIONS))
    *sections, name = where.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return values


def test_defaults_are_filled_in() -> None:
    config = build(RunConfig, SECTIONS)
    assert config.sft.optimizer == configs.OptimizerConfig()
    assert config.model == ModelConfig()
    assert isinstance(config.sft.mixce_eta, float)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            "sft.optimizer.learning_rat",
            1.0,
            r"config\.sft\.optimizer\.learning_rat.*'learning_rate'",
        ),
        ("modell", {}, r"config\.modell is not a known field; did you mean 'model'"),
        ("rank.zzz", 1, r"config\.rank\.zzz is not a known field; known: epochs, batch_size"),
        ("sft.epochs", "2", r"config\.sft\.epochs = '2' must be of type int"),
        ("sft.epochs", 2.0, r"config\.sft\.epochs = 2\.0 must be of type int"),
        ("sft.epochs", True, r"config\.sft\.epochs = True must be of type int"),
        ("sft.mixce_eta", None, r"config\.sft\.mixce_eta = None must be of type float"),
        ("sft.mixce_eta", False, r"config\.sft\.mixce_eta = False must be of type float"),
        ("sft.optimizer.centralize", 1, r"centralize = 1 must be of type bool"),
        ("sft.optimizer", 3, r"config\.sft\.optimizer = 3 must be a section"),
        ("sft.epochs", 0, r"config\.sft: epochs = 0 must be greater than 0"),
        ("sft.mixce_eta", 1.5, r"mixce_eta = 1\.5 must be between 0 and 1"),
        ("sft.neftune_alpha", -1, r"neftune_alpha = -1\.0 must be 0 or greater"),
        ("sft.neftune_alpha", float("nan"), r"neftune_alpha = nan"),
        ("sft.optimizer.learning_rate", float("nan"), r"learning_rate = nan"),
        ("sft.optimizer.beta_decay", -0.8, r"beta_decay = -0.8 must be 0 or greater"),
        ("sft.accumulation", 3, r"batch_size = 4 is not divisible by accumulation = 3"),
        ("sft.optimizer.name", "adam", r"name = 'adam' is not one of 'adalite', 'adamw'"),
        ("compute.dtype", "float16", r"dtype = 'float16' is not one of 'float32', 'bfloat16'"),
        ("generate.top_p", 0.0, r"top_p = 0\.0 must be in \(0, 1\]"),
        ("generate.temperature", -0.1, r"temperature = -0\.1"),
        ("data.source", "csv", r"source = 'csv' is not one of"),
        ("data.source", "jsonl", r"train is empty"),
        ("data.num_train", 0, r"num_train = 0 must be greater than 0"),
        ("model.num_attention_heads", 7, r"hidden_size = 2560 is not divisible by"),
        ("model.num_key_value_heads", 5, r"is not divisible by num_key_value_heads = 5"),
        ("model.partial_rotary_factor", 0.01, r"partial_rotary_factor = 0\.01 .* 0 rotary"),
        ("model.eos_token_id", 50304, r"eos_token_id = 50304 is outside"),
        ("model.hidden_act", "swiglu", r"hidden_act = 'swiglu' is not one of"),
    ],
)
def test_wrong_values_are_named(where: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, changed(where, value))


def test_rows_and_answers_fit_the_models_context() -> None:
    config, model = (
        build(RunConfig, changed("sft.seq_len", 65)),
        ModelConfig(max_position_embeddings=64),
    )
    phases = {"sft": config.sft, "rank": config.rank}
    with pytest.raises(
        ConfigError, match=r"sft\.seq_len = 65 exceeds .* = 64; set .*seq_len=64 or"
    ):
        check_context(model, phases)
    with pytest.raises(ConfigError, match=r"max_new_tokens = 64 leaves no room for a question"):
        check_context(model, {}, max_new_tokens=64)
    check_context(ModelConfig(max_position_embeddings=65), phases, max_new_tokens=64)


def test_missing_field_is_named() -> None:
    without = {name: value for name, value in PHASE.items() if name != "batch_size"}
    with pytest.raises(ConfigError, match=r"config\.rank\.batch_size is missing"):
        build(RunConfig, {**SECTIONS, "rank": without})


def test_overrides_reach_the_value(path: str) -> None:
    overrides = [
        "--config.sft.optimizer.learning_rate=0.25",
        "--config.rank.epochs=3",
        "--config.sft.accumulation=2",  # left to its default by the file
        "--config.rank.optimizer.freeze_embeddings=false",
        "--config.model.hidden_act=gelu",
        "--config.seed=7",
    ]
    config = load(path, overrides)
    assert config.sft.optimizer.learning_rate == 0.25
    assert (config.rank.epochs, config.sft.epochs, config.sft.accumulation) == (3, 1, 2)
    assert config.rank.optimizer.freeze_embeddings is False
    assert config.sft.optimizer.freeze_embeddings is True
    assert (config.model.hidden_act, config.seed) == ("gelu", 7)
    assert load(path).sft.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    "override",
    [
        "--config.sft.epoch=2",
        "--config.sft.epochs=many",
        "--config.sft.epochs=-1",
        "--sft.epochs=2",
        "--no-such-flag",
        "config.sft.epochs=2",  # without the dashes: must not be passed over
    ],
)
def test_wrong_overrides_are_refused(path: str, override: str) -> None:
    with pytest.raises(ConfigError, match=r"epoch|flag"):
        load(path, [override])


def test_a_misspelt_field_is_told_in_words(path: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no field 'epoch'\. Did you mean \"epochs\""):
        load(path, ["--config.sft.epoch=2"])


def test_saved_config_is_read_back(path: str, tmp_path: Path) -> None:
    config = load(path, ["--config.sft.epochs=2"])
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(dataclasses.asdict(config)))
    assert load(str(saved)) == config
    with pytest.raises(ConfigError, match="takes no overrides"):
        load(str(saved), ["--config.seed=1"])


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.py"))
    (tmp_path / "cut.json").write_text('{"seed": ')
    with pytest.raises(ConfigError, match=r"cut\.json is no JSON"):
        load(str(tmp_path / "cut.json"))
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=f"seed = {seed} must be"):
            load("configs/tiny.py", [f"--config.seed={seed}"])
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="get_config"):
        load(str(tmp_path / "empty.py"))


def test_difference_lists_every_leaf() -> None:
    old = {"a": {"b": 1, "c": {"d": 2}}, "same": [1], "gone": 3}
    new = {"a": {"b": 1, "c": {"d": 5}}, "same": [1], "new": None, "more": 4}
    assert difference(old, new) == ["a.c.d: 2 -> 5", "gone: 3 -> None", "more: None -> 4"]
    assert difference(old, old) == []


# --- ModelConfig

MODEL_CHANGES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 0.1,
    "rope_theta": 500.0,
    "partial_rotary_factor": 1.0,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": True,
    "tie_word_embeddings": True,
}
NOT_IN_THE_LOGITS = {
    "initializer_range",  # of fresh weights, below
    "max_position_embeddings",  # the sampler's limit, test_sampler.py
    "bos_token_id",  # these two are for config.json, below
    "eos_token_id",
}


@pytest.mark.parametrize("field", MODEL_CHANGES)
def test_every_model_field_changes_the_logits(field: str) -> None:
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    assert MODEL_CHANGES.keys() | NOT_IN_THE_LOGITS == fields
    base = {**TINY, "partial_rotary_factor": 0.5 if field == "partial_rotary_factor" else 1.0}
    tokens = jnp.arange(24).reshape(2, 12)

    def logits(**options: Any) -> np.ndarray:
        return np.asarray(jax.jit(StableLM.logits)(tiny_model(**{**base, **options}), tokens))

    assert MODEL_CHANGES[field] != base.get(field)
    before, after = logits(), logits(**{field: MODEL_CHANGES[field]})
    if field == "vocab_size":
        assert after.shape == (2, 12, 67)
    else:
        assert np.abs(after - before).max() > 1e-3


def test_initial_weights_have_the_range_given() -> None:
    config = ModelConfig(**{**TINY, "hidden_size": 64, "initializer_range": 0.05})
    for name, leaf in named_leaves(StableLM(config, jax.random.key(0))).items():
        if "norm" in name or name.endswith("bias"):
            assert set(np.unique(leaf)) == {float("norm" in name and name.endswith("scale"))}
        else:
            assert leaf.std() == pytest.approx(0.05, rel=0.1)


def test_model_config_survives_transformers() -> None:
    ours = ModelConfig(
        **{**TINY, "rope_theta": 777.0, "layer_norm_eps": 1e-3, "hidden_act": "gelu"},
        use_parallel_residual=True,
        eos_token_id=5,
        bos_token_id=6,
    )
    theirs = StableLmConfig(**ours.to_hf())
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5
    for name in ("hidden_size", "layer_norm_eps", "qk_layernorm", "eos_token_id", "hidden_act"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert ModelConfig.from_hf(theirs.to_dict()) == ours
    assert ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False))) == ours
