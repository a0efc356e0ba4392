import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import FAMILY, make_hf, reference_logits

from convert import load_hf
from memphis_jax.config import ConfigError, ModelConfig
from memphis_jax.layers import QUERY_CHUNK, Rotary, embedding, layer_norm, linear
from memphis_jax.model import ONE_DEVICE, StableLM, flatten, project
from tests.helpers import TINY, assert_close

pytestmark = pytest.mark.slow  # compiles much; `make check` leaves it out

logits = jax.jit(StableLM.logits)


@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_those_of_transformers(name, tmp_path):
    reference = make_hf(tmp_path, **FAMILY[name])
    model = load_hf(tmp_path)
    assert {array.dtype for array in flatten(model).values()} == {jnp.dtype("float32")}
    rng = np.random.default_rng(0)
    for length in (1, QUERY_CHUNK + 37):
        tokens = rng.integers(0, reference.config.vocab_size, (2, length))
        expected = reference_logits(reference, tokens)
        ours = np.asarray(logits(model, jnp.asarray(tokens)))
        assert expected.std() > 0.3, "the reference's logits are too flat to tell anything"
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_every_initial_matrix_is_a_draw_of_its_own():
    config = ModelConfig(**{**TINY, "hidden_size": 32, "intermediate_size": 32})
    config = replace(config, vocab_size=32, num_key_value_heads=4)
    leaves = flatten(StableLM(config, jax.random.key(0))).values()
    matrices = [x.reshape(-1, 32, 32) for x in leaves if x.shape[-2:] == (32, 32)]
    flat = np.concatenate(matrices).reshape(-1, 32 * 32)
    assert len(flat) == 2 + 7 * config.num_hidden_layers
    np.testing.assert_allclose(flat.std(axis=1), config.initializer_range, rtol=0.1)
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.2


def test_positions_are_those_given(tmp_path):
    reference = make_hf(tmp_path, **FAMILY["3b-ratios"])
    model = load_hf(tmp_path)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 97, (2, 40))
    positions = np.cumsum(rng.integers(1, 9, (2, 40)), axis=1)
    expected = reference_logits(reference, tokens, positions)
    ours = np.asarray(logits(model, jnp.asarray(tokens), jnp.asarray(positions)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    counted = np.broadcast_to(np.arange(40), (2, 40))
    default = np.asarray(logits(model, jnp.asarray(tokens)))
    np.testing.assert_array_equal(logits(model, jnp.asarray(tokens), jnp.asarray(counted)), default)
    assert np.abs(ours - default).max() > 0.1


def test_both_config_dialects_give_the_same_model(shared):
    folder = shared / "data" / "stablelm"
    epoch, native = (
        ModelConfig.from_hf(json.loads((folder / f"config.{name}.json").read_text()))
        for name in ("epoch", "native")
    )
    assert epoch == native
    assert (native.head_dim, native.rotary_dim, native.vocab_size) == (80, 20, 50304)
    assert (native.layer_norm_eps, native.rope_theta) == (1e-5, 10000.0)


def test_tiny_random_config_is_read_with_gelu(shared):
    text = (shared / "data" / "stablelm" / "config.tiny-random.json").read_text()
    config = ModelConfig.from_hf(json.loads(text))
    assert (config.hidden_act, config.hidden_size, config.intermediate_size) == ("gelu", 64, 37)


def test_old_keys_are_not_ignored():
    old = {"model_type": "stablelm_epoch", "norm_eps": 1e-3, "rope_pct": 0.5, "rope_theta": 77}
    config = ModelConfig.from_hf({**old, "num_attention_heads": 8, "hidden_size": 64})
    assert (config.layer_norm_eps, config.partial_rotary_factor) == (1e-3, 0.5)
    assert (config.rope_theta, config.num_key_value_heads) == (77.0, 8)


@pytest.mark.parametrize("name", FAMILY)
def test_config_round_trip_through_hf(name, tmp_path):
    make_hf(tmp_path, **FAMILY[name])
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert ModelConfig.from_hf(config.to_hf()) == config
    for field, value in FAMILY[name].items():
        assert getattr(config, field) == value


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
        ("hidden_act", {"hidden_act": "mish"}),
        ("hidden_dropout", {"hidden_dropout": 0.1}),
        ("attention_dropout", {"attention_dropout": 0.1}),
        ("model_type", {"model_type": "llama"}),
        ("model_type", {"model_type": None}),
        ("rotary_scaling_factor", {"rotary_scaling_factor": 2.0}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("head_dim", {"head_dim": 64}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.0125}),
        ("num_key_value_heads", {"num_key_value_heads": 5}),
        # values of another type than any program writes
        ("eos_token_id", {"eos_token_id": []}),
        ("rope_parameters", {"rope_parameters": "yarn"}),
        ("hidden_act", {"hidden_act": ["silu"]}),
        ("num_attention_heads", {"num_attention_heads": 0, "head_dim": 80}),
        ("num_attention_heads", {"num_attention_heads": "32", "head_dim": 80}),
    ],
)
def test_unsupported_config_is_refused_by_name(field, change, shared):
    text = (shared / "data" / "stablelm" / "config.native.json").read_text()
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_hf({**json.loads(text), **change})


def test_null_is_as_good_as_absent(shared):
    config = json.loads((shared / "data" / "stablelm" / "config.native.json").read_text())
    nulls = dict.fromkeys(("rotary_scaling_factor", "rope_scaling", "head_dim", "rope_parameters"))
    assert ModelConfig.from_hf({**config, **nulls}) == ModelConfig.from_hf(config)


def test_rotary_gradient_is_the_derivative():
    """Against the rotation as a matrix [dim, dim] per position, which jax derives by itself."""
    positions, dim = jnp.arange(5, dtype=jnp.int32)[None], 6
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 10))
    dy = jax.random.normal(jax.random.key(1), x.shape)
    rotary = Rotary(positions, dim, 100.0)
    identity = jnp.eye(10)[None, None]  # [1, 1, 10, 10]: every dimension a head of its own
    matrices = rotary(jnp.broadcast_to(identity, (1, 5, 10, 10)))  # [1, T, in, out]
    _, back = jax.vjp(lambda x: jnp.einsum("btnh,bthg->btng", x, matrices), x)
    _, ours = jax.vjp(rotary, x)
    assert_close({"dx": ours(dy)[0]}, {"dx": back(dy)[0]})


def test_what_is_bfloat16_and_what_is_float32():
    """257 is no bfloat16: sums that reach it are float32."""
    x, ones = jnp.ones((257, 2), jnp.bfloat16), jnp.ones((2, 2))
    for y in (linear(x, ones), layer_norm(x, ones[0], ones[0], 1e-5), embedding(ones, 1, x.dtype)):
        assert y.dtype == jnp.bfloat16
    gradient = jax.grad(lambda kernel: linear(x, kernel).sum().astype(jnp.float32))(ones)
    assert gradient.dtype == jnp.float32 and (gradient == 257).all()
    logits = project(jnp.asarray([256.0, 1.0], jnp.bfloat16), ones)
    assert logits.dtype == jnp.float32 and logits.tolist() == [257.0, 257.0]


def test_remat_is_not_undone_where_layers_are_unrolled():
    """XLA would see that what is computed again is known, and keep it after all."""
    model = StableLM(ModelConfig(**TINY), jax.random.key(0))
    x = jnp.zeros((1, 32, TINY["hidden_size"]))
    positions = jnp.arange(32)[None]

    def flops(remat):
        ops = ONE_DEVICE._replace(unroll=TINY["num_hidden_layers"])
        run = lambda m, x: m.hidden(x, positions, None, remat=remat, ops=ops).sum()  # noqa: E731
        return jax.jit(jax.grad(run)).lower(model, x).compile().cost_analysis()["flops"]

    # Of forward 1 and backward 2, all but down_proj's product is computed again.
    assert flops("full") / flops("none") == pytest.approx(4 / 3, abs=0.1)
