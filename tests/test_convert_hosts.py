"""Several processes export one sharded checkpoint: the same tensors, bounded memory, no orphans."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference_models import SMALL, read_folder
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from convert.hf_folder import ConvertError
from convert.hosts import ALONE, Hosts, team_of
from convert.mapping import places
from convert.plan import divide
from convert.to_hf import to_hf
from convert.verify import verify
from convert.weights import open_checkpoint
from memphis_jax.checkpoint import open_manager, save
from memphis_jax.config import ModelConfig
from memphis_jax.model import abstract, flatten, unflatten
from memphis_jax.tensors import split

REPO = Path(__file__).resolve().parents[1]
WHOLE = ModelConfig(**{**SMALL, "vocab_size": 96, "qk_layernorm": True, "use_qkv_bias": True})
GRACE = 10  # s that the processes give one another to stop, and that a busy machine needs

MAIN = "import sys; from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
# The process JAX_PROCESS_ID = {who} stops at its third read: it {how}.
FAULTY = """
import os, signal, sys, time
from convert import weights

read, reads = weights.Checkpoint.read, []
def third_time_unlucky(*args, **kwargs):
    reads.append(1)
    if len(reads) == 3 and os.environ["JAX_PROCESS_ID"] == "{who}":
        {how}
    return read(*args, **kwargs)
weights.Checkpoint.read = third_time_unlucky
"""
DIES = "os.kill(os.getpid(), signal.SIGKILL)"


def sharded_checkpoint(folder: Path, config: ModelConfig, mesh_shape: tuple[int, ...]) -> dict:
    """Random weights on 8 devices, matrices over fsdp x model, saved as the trainer does."""
    auto = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "model"), axis_types=auto)
    rng = np.random.default_rng(0)
    values, arrays = {}, {}
    for leaf, like in flatten(abstract(config)).items():
        is_matrix = leaf.endswith("kernel") or leaf == "embed_tokens"
        over = ("fsdp", "model") if is_matrix else ()
        spec = PartitionSpec(*[None] * (like.ndim - len(over)), *over)
        values[leaf] = rng.random(like.shape, np.float32) - np.float32(0.5)
        arrays[leaf] = jax.device_put(values[leaf], NamedSharding(mesh, spec))
    with open_manager(folder, keep=1) as manager:
        save(manager, 5, unflatten(config, arrays), {"phase": "sft"})
    return values


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(count: int, *command: str | Path, code: str = MAIN, **environment: str) -> list:
    """`count` processes of `python -m convert`, told of each other as on a pod."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=REPO,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(process),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def finish(processes: list) -> list[tuple[int, str, str]]:
    """[(exit code, stdout, stderr)]; none may outlive the test."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]


def test_shares_are_even_and_files_small_enough():
    sizes = {f"t{i}": size for i, size in enumerate([7, 1, 1, 3, 9, 2, 2, 4, 1, 6])}
    for processes in (1, 2, 3, 4):
        owners = divide(sizes, processes)
        assert list(owners.values()) == sorted(owners.values())  # runs
        for process in range(processes):
            share = sum(size for name, size in sizes.items() if owners[name] == process)
            assert abs(share - 36 / processes) <= max(sizes.values())
        files = split(sizes, 8, owners)
        assert [name for members in files.values() for name in members] == list(sizes)
        for members in files.values():
            assert len({owners[name] for name in members}) == 1
            assert len(members) == 1 or sum(sizes[name] for name in members) <= 8
    assert divide({"a": 5, "b": 0}, 2) == {"a": 1, "b": 1}  # nothing beyond the last process


@pytest.mark.parametrize(
    ("address", "count", "process", "seconds", "message"),
    [
        ("10.0.0.1:8476", "4", "", "", "JAX_PROCESS_ID not set"),
        ("10.0.0.1:8476", "", "", "", "JAX_NUM_PROCESSES and JAX_PROCESS_ID not set"),
        ("10.0.0.1", "4", "1", "", "JAX_COORDINATOR_ADDRESS=10.0.0.1, .* HOST:PORT"),
        ("10.0.0.1:8476", "four", "1", "", "JAX_NUM_PROCESSES=four"),
        ("10.0.0.1:8476", "4", "4", "", "JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4"),
        ("10.0.0.1:8476", "4", "1", "5 min", "MEMPHIS_BARRIER_SECONDS=5 min"),
        ("10.0.0.1:8476", "4", "1", "0", "MEMPHIS_BARRIER_SECONDS=0"),
    ],
)
def test_a_wrong_environment_is_named(address, count, process, seconds, message):
    values = (address, count, process, seconds)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    variables = dict(zip((*names, "MEMPHIS_BARRIER_SECONDS"), values, strict=True))
    with pytest.raises(ConvertError, match=message):
        Hosts.of({name: value for name, value in variables.items() if value})


def test_the_environment_of_a_process():
    assert Hosts.of({"PATH": "/bin"}) == ALONE
    variables = {"JAX_COORDINATOR_ADDRESS": "[fe80::1]:8476", "MEMPHIS_BARRIER_SECONDS": "20"}
    variables |= {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert Hosts.of(variables) == Hosts(3, 4, ("fe80::1", 8476), 20.0)


def join(hosts: Hosts, dtype: str = "keep") -> str:
    """What a process says at the end: the error, or "" where all came."""
    try:
        with team_of(hosts, {"--dtype": dtype}) as team:
            if hosts.process:
                return team.wait_for("bye")[0]
            team.part(bye="")
            return ""
    except ConvertError as error:
        return str(error)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(1, "keep"), (2, "keep")], ""),
        ([(1, "keep"), (2, "float32")], "process 2 runs with --dtype=float32, process 0 with"),
        ([(1, "keep"), (1, "keep")], "JAX_PROCESS_ID=1 came twice: every process needs one"),
    ],
)
def test_processes_must_agree(others, message):
    address = ("127.0.0.1", free_port())
    with ThreadPoolExecutor(4) as pool:
        said = [pool.submit(join, Hosts(0, 3, address))]
        stranger = call(address)  # says nothing that we understand
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        said += [pool.submit(join, Hosts(who, 3, address), dtype) for who, dtype in others]
        assert {future.result()[: len(message) or None] for future in said} == {message}
        assert stranger.recv(1) == b""
        stranger.close()


def call(address: tuple[str, int]) -> socket.socket:
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(address)
        time.sleep(0.05)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("mesh_shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)])
def test_rows_of_a_sharded_leaf_are_read_alone(mesh_shape, tmp_path):
    values = sharded_checkpoint(tmp_path / "run", WHOLE, mesh_shape)
    source = open_checkpoint(tmp_path / "run")
    for leaf, value in values.items():
        np.testing.assert_array_equal(source.read(leaf, value.dtype).view("f4"), value)
        if leaf.startswith("layers/"):
            part = source.read(leaf, value.dtype, rows=range(1, 2)).view("f4")
            np.testing.assert_array_equal(part, value[1:2])
        if leaf.endswith("kernel"):
            turned = source.read(leaf, value.dtype, transposed=True).view("f4")
            np.testing.assert_array_equal(turned, value.swapaxes(-1, -2))


@pytest.mark.slow
def test_any_number_of_processes_exports_the_same(tmp_path):
    run, limit = tmp_path / "run", 40_000
    sharded_checkpoint(run, WHOLE, (2, 2, 2))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    one = to_hf(run, tmp_path / "1")
    assert [name for name in one["files"] if name.endswith(".safetensors")] == ["model.safetensors"]
    expected = read_folder(tmp_path / "1")
    for count, options in ((1, []), (2, []), (4, ["--max-shard-size", f"{limit}B"])):
        hf = tmp_path / f"of{count}"
        for code, out, err in finish(start(count, "to-hf", run, hf, *options)):
            assert code == 0, err
            assert err == "" and (out == "") != out.startswith(f"{hf}: step 5")
        tensors = read_folder(hf)
        assert tensors.keys() == expected.keys()
        assert all(tensors[n].tobytes() == expected[n].tobytes() for n in tensors)
        verdict = verify(hf, run)
        assert verdict.differences == [] and verdict.compared == len(expected)
        certificate = json.loads((hf / "conversion.json").read_text())
        files = [certificate.pop("files"), {**one["files"]}]
        assert certificate == {key: one[key] for key in certificate} and "source" in certificate
        layouts = [{n: f.pop(n) for n in list(f) if n.startswith("model")} for f in files]
        assert files[0] == files[1] and len(files[0]) == 3  # config, generation config, tokenizer
        assert (layouts[0] == layouts[1]) == (count == 1)
        if count == 4:
            sizes = [sum(a.nbytes for a in read_file(f)) for f in hf.glob("*.safetensors")]
            assert len(sizes) > 4 and max(sizes) <= limit
        loaded, info = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, torch.from_numpy(expected[name])), name
    assert not list(tmp_path.glob(".*"))  # no unfinished folder is left


def read_file(path: Path) -> list[np.ndarray]:
    with safe_open(path, "numpy") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a dict)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_is_named_and_nothing_is_published(who, tmp_path):
    sharded_checkpoint(tmp_path / "run", WHOLE, (2, 2, 2))
    command = ("to-hf", tmp_path / "run", tmp_path / "hf")
    begun = time.monotonic()
    ended = finish(start(3, *command, code=FAULTY.format(who=who, how=DIES) + MAIN))
    assert time.monotonic() - begun < 300  # the limit; a closed connection is noticed at once
    assert ended.pop(who)[0] == -signal.SIGKILL
    for code, _, err in ended:
        assert code == 2
        line = f"memphis-convert to-hf: error: process {who} of 3 ended before the export was"
        assert err.startswith(line) and err.count("\n") == 1
    assert not (tmp_path / "hf").exists()
    assert [code for code, _, _ in finish(start(3, *command))] == [0, 0, 0]
    assert verify(tmp_path / "hf", tmp_path / "run").differences == []
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_silent_process_is_named_within_the_limit(tmp_path):
    sharded_checkpoint(tmp_path / "run", WHOLE, (1, 8, 1))
    code = FAULTY.format(who=1, how="time.sleep(300)") + MAIN
    command = ("to-hf", tmp_path / "run", tmp_path / "hf")
    processes = start(3, *command, code=code, MEMPHIS_BARRIER_SECONDS="12")
    ended = finish([processes[0], processes[2]])
    processes[1].kill()
    processes[1].communicate()
    for code, _, err in ended:
        assert code == 2 and "error: process 1 of 3 has not been heard of for 12 s" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
def test_who_does_not_come_is_named(tmp_path):
    sharded_checkpoint(tmp_path / "run", WHOLE, (1, 8, 1))
    command = ("to-hf", tmp_path / "run", tmp_path / "hf")
    options = {"JAX_NUM_PROCESSES": "4", "MEMPHIS_BARRIER_SECONDS": "10"}
    for code, _, err in finish(start(2, *command, **options)):
        assert code == 2 and "error: process 2 of 4 and process 3 of 4 did not come to 127" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
    sharded_checkpoint(tmp_path / "run", WHOLE, (1, 8, 1))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    for code, _, err in finish(start(2, "to-hf", tmp_path / "run", tmp_path / "taken")):
        assert code == 2 and "is not empty and is not an earlier export" in err
    code = FAULTY.format(who=1, how="raise OSError(28, 'No space left on device')") + MAIN
    first, second = finish(start(2, "to-hf", tmp_path / "run", tmp_path / "hf", code=code))
    assert first[0] == second[0] == 2
    assert "error: process 1 of 2: [Errno 28] No space left on device" in first[2]
    assert "error: [Errno 28] No space left on device" in second[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]


# VmHWM, not ru_maxrss: Linux hands the parent's ru_maxrss down to a started process.
PEAK = """
import re, sys
import convert.to_hf
from convert.__main__ import main

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = peak()
code = main(sys.argv[1:])
print(peak() - before)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_of_each_process_is_bounded_by_its_share(tmp_path):
    """1 GB from 4 processes, chunks over all layers: each peaks below 1.3 shares + one tensor."""
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    sizes = {name: 4 * int(np.prod(place.shape)) for name, place in places(config).items()}
    assert sum(sizes.values()) > 1e9
    values = sharded_checkpoint(tmp_path / "run", config, (1, 4, 2))
    ended = finish(start(4, "to-hf", tmp_path / "run", tmp_path / "hf", code=PEAK))
    for process, (code, out, err) in enumerate(ended):
        assert code == 0, err
        share = (tmp_path / "hf" / f"model-{process + 1:05}-of-00004.safetensors").stat().st_size
        bound = 1.3 * share + max(sizes.values())
        peak = int(re.findall(r"^\d+$", out, re.M)[-1])
        print(
            f"process {process}: peak {peak / 1e6:.0f} MB, share {share / 1e6:.0f} MB, "
            f"bound {bound / 1e6:.0f} MB of {sum(sizes.values()) / 1e6:.0f} MB"
        )
        assert share < 1.1 * sum(sizes.values()) / 4
        assert peak < bound
    certificate = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert certificate["tensors"].keys() == sizes.keys()
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    name = "model.layers.3.mlp.up_proj.weight"
    with safe_open(tmp_path / "hf" / index["weight_map"][name], "numpy") as file:
        expected = values["layers/mlp/up_proj/kernel"][3].T
        np.testing.assert_array_equal(file.get_tensor(name), expected)
